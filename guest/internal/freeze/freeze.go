// Package freeze holds the machine's writable file systems still, so that the
// host can copy their disks at one moment. Never for longer than was asked for:
// a host that dies meanwhile must not leave a machine that cannot write.
package freeze

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// Operations of ioctl(2) on a mounted file system (linux/fs.h).
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// Freezer freezes and thaws one set of file systems.
type Freezer struct {
	paths []string
	act   func(path string, request uintptr) error
	sync  func()

	mu     sync.Mutex
	frozen int // how many of paths, from the first on
	timer  *time.Timer
	turn   int // counts freezes, so that an old timer ends no new one
}

// New makes a freezer of mounted file systems, in the order in which they are frozen.
func New(paths []string) *Freezer {
	return &Freezer{paths: paths, act: ioctl, sync: syscall.Sync}
}

// Freeze writes back what is dirty and lets no write through until Thaw, or
// until limit is over. Frozen already: the limit begins anew. Whoever cannot
// freeze everything freezes nothing.
func (f *Freezer) Freeze(limit time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.paths) == 0 {
		return errors.New("the machine has no disk of its own")
	}
	if f.frozen == 0 {
		// Writing back takes as long as it takes; the freeze itself then finds little left.
		f.sync()
	}
	for f.frozen < len(f.paths) {
		if err := f.act(f.paths[f.frozen], fiFreeze); err != nil {
			f.thaw()
			return fmt.Errorf("freeze %s: %w", f.paths[f.frozen], err)
		}
		f.frozen++
	}
	if f.timer != nil {
		f.timer.Stop()
	}
	f.turn++
	turn := f.turn
	f.timer = time.AfterFunc(limit, func() { f.expire(turn) })
	return nil
}

// Thaw lets writes through again. True when they were held up until now; false
// when the limit was over before.
func (f *Freezer) Thaw() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.thaw()
}

func (f *Freezer) expire(turn int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if turn == f.turn {
		f.thaw()
	}
}

// thaw undoes what is frozen, newest first. Called with the lock held.
func (f *Freezer) thaw() bool {
	was := f.frozen > 0 && f.frozen == len(f.paths)
	for f.frozen > 0 {
		f.frozen--
		// Somebody in the machine may have thawed it; then the copy is none of one moment.
		if f.act(f.paths[f.frozen], fiThaw) != nil {
			was = false
		}
	}
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	return was
}

func ioctl(path string, request uintptr) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, folder.Fd(), request, 0); errno != 0 {
		return errno
	}
	return nil
}
