package process

import (
	"os"
	"syscall"
	"unsafe"
)

// Terminal is the master side of a pseudo terminal.
type Terminal struct {
	master *os.File
	raw    syscall.RawConn
}

const tiocGPTPeer = 0x5441 // opens the slave without a path; amd64 and arm64

type windowSize struct{ rows, cols, xPixels, yPixels uint16 }

// newTerminal returns the terminal and its slave, which the caller closes
// after the fork.
func newTerminal(rows, cols int, uid uint32) (*Terminal, *os.File, error) {
	// Non-blocking from the start: the runtime's poller then serves it.
	fd, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master := os.NewFile(uintptr(fd), "/dev/ptmx")
	raw, _ := master.SyscallConn()
	t := &Terminal{master, raw}
	slave, err := t.openSlave()
	if err == nil {
		err = t.Resize(rows, cols)
	}
	if err != nil {
		master.Close()
		return nil, nil, err
	}
	// Programs reopen /dev/tty and check who owns it. The group stays, as on
	// any system where devpts is mounted with gid=.
	slave.Chown(int(uid), -1)
	return t, slave, nil
}

func (t *Terminal) openSlave() (*os.File, error) {
	var unlocked int32
	if err := t.ioctl(syscall.TIOCSPTLCK, uintptr(unsafe.Pointer(&unlocked))); err != nil {
		return nil, err
	}
	var slave uintptr
	var errno syscall.Errno
	t.raw.Control(func(fd uintptr) {
		slave, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, tiocGPTPeer, syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC)
	})
	if errno != 0 {
		return nil, os.NewSyscallError("TIOCGPTPEER", errno)
	}
	return os.NewFile(slave, "pts"), nil
}

// Resize sets the window size; the foreground group gets SIGWINCH.
func (t *Terminal) Resize(rows, cols int) error {
	size := windowSize{rows: uint16(rows), cols: uint16(cols)}
	return t.ioctl(syscall.TIOCSWINSZ, uintptr(unsafe.Pointer(&size)))
}

// Foreground returns the process group that the terminal's keys go to.
func (t *Terminal) Foreground() (int, error) {
	var group int32
	err := t.ioctl(syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	return int(group), err
}

func (t *Terminal) ioctl(request, argument uintptr) error {
	var errno syscall.Errno
	err := t.raw.Control(func(fd uintptr) {
		_, _, errno = syscall.Syscall(syscall.SYS_IOCTL, fd, request, argument)
	})
	if err == nil && errno != 0 {
		err = os.NewSyscallError("ioctl", errno)
	}
	return err
}
