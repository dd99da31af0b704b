// Package port opens a virtio-serial port as a channel for the multiplexer.
package port

import (
	"fmt"
	"os"
	"syscall"

	"fused/internal/mux"
)

// Virtio is one virtio-serial port, for example /dev/vport0p1.
//
// While no host is connected the port reports a hang-up and read returns 0, so
// a level-triggered wait would spin. The Go runtime's poller registers
// descriptors edge-triggered (EPOLLIN|EPOLLOUT|EPOLLET) and is used through
// RawConn, which leaves it to us to say that "0 bytes" means "wait": the
// goroutine sleeps until the driver reports a change, without a thread.
type Virtio struct {
	file *os.File
	raw  syscall.RawConn
	// heard is true when bytes have come since the last hang-up; each hang-up
	// is reported once.
	heard bool
}

// OpenVirtio opens the port. Only one process can have it open.
func OpenVirtio(path string) (*Virtio, error) {
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return FromDescriptor(fd, path)
}

// FromDescriptor takes over a non-blocking descriptor that epoll accepts.
func FromDescriptor(fd int, name string) (*Virtio, error) {
	file := os.NewFile(uintptr(fd), name)
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("port %s: %w", name, err)
	}
	return &Virtio{file: file, raw: raw}, nil
}

// Read implements mux.Port.
func (v *Virtio) Read(p []byte) (int, error) {
	var n int
	var err error
	wait := v.raw.Read(func(fd uintptr) bool {
		n, err = retry(syscall.Read, fd, p)
		if err == syscall.EAGAIN {
			return false
		}
		return err != nil || n > 0 || v.heard
	})
	switch {
	case wait != nil:
		return 0, wait
	case err != nil:
		return 0, &os.PathError{Op: "read", Path: v.file.Name(), Err: err}
	case n == 0:
		v.heard = false
		return 0, mux.ErrNoHost
	}
	v.heard = true
	return n, nil
}

// Write implements mux.Port. The driver takes at most 32 KiB at a time, and
// nothing while its queue is full.
func (v *Virtio) Write(p []byte) (int, error) {
	done := 0
	var err error
	wait := v.raw.Write(func(fd uintptr) bool {
		for done < len(p) && err == nil {
			var n int
			n, err = retry(syscall.Write, fd, p[done:])
			if err == syscall.EAGAIN || (err == nil && n == 0) { // 0: the queue was full after all
				err = nil
				return false
			}
			done += max(n, 0)
		}
		return true
	})
	if wait != nil {
		return done, wait
	}
	if err != nil {
		return done, &os.PathError{Op: "write", Path: v.file.Name(), Err: err}
	}
	return done, nil
}

// Close implements mux.Port.
func (v *Virtio) Close() error { return v.file.Close() }

func retry(call func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := call(int(fd), p)
		if err != syscall.EINTR {
			return n, err
		}
	}
}
