package process

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"
)

// Sink takes a command's output. The bytes are valid until it returns. While
// it blocks, the command is held back by its full pipe.
type Sink func(p []byte)

// readSize fits, with the headers of an exec frame and of the multiplexer,
// into one write to the port.
const readSize = 32768 - 128

// terminalLeft bounds what a terminal can still hold after its command ended:
// the kernel's limit for tty buffers is 64 KiB, and 4 KiB are in line.
const terminalLeft = 128 << 10

// output reads one stream of a command.
type output struct {
	file     *os.File
	raw      syscall.RawConn
	terminal bool
	done     chan struct{}
}

func newOutput(file *os.File, terminal bool) (*output, error) {
	raw, err := file.SyscallConn()
	return &output{file: file, raw: raw, terminal: terminal, done: make(chan struct{})}, err
}

// pump reads until the end, or until finish: then it takes what is there.
func (o *output) pump(sink Sink) {
	defer close(o.done)
	buf := make([]byte, readSize)
	for {
		n, err := o.read(buf)
		if n > 0 {
			sink(buf[:n])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf, sink)
			return
		}
		if err != nil || n == 0 {
			return // end of the pipe; EIO for a terminal without slaves
		}
	}
}

// finish says that the command has ended. Background work that it left behind
// may hold the other end of the pipe for hours: the pump must not wait for it.
func (o *output) finish() { o.file.SetReadDeadline(time.Unix(1, 0)) }

func (o *output) read(buf []byte) (int, error) {
	var n int
	var err error
	wait := o.raw.Read(func(fd uintptr) bool {
		n, err = readNow(fd, buf)
		return err != syscall.EAGAIN
	})
	if wait != nil {
		return 0, wait
	}
	return n, err
}

// drain takes what the command had written before it ended, without waiting
// and without following a background process that goes on writing.
func (o *output) drain(buf []byte, sink Sink) {
	left := o.buffered()
	for left > 0 {
		var n int
		var err error
		o.raw.Control(func(fd uintptr) { n, err = readNow(fd, buf[:min(left, len(buf))]) })
		if n <= 0 || err != nil {
			return
		}
		sink(buf[:n])
		left -= n
	}
}

// buffered is how much the kernel holds for us. For terminals FIONREAD does not
// count what is still on its way through the line discipline, which a read
// brings in.
func (o *output) buffered() int {
	if o.terminal {
		return terminalLeft
	}
	var count int32
	o.raw.Control(func(fd uintptr) {
		syscall.Syscall(syscall.SYS_IOCTL, fd, syscall.TIOCINQ, uintptr(unsafe.Pointer(&count)))
	})
	return int(count)
}

func readNow(fd uintptr, buf []byte) (int, error) {
	for {
		n, err := syscall.Read(int(fd), buf)
		if err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
