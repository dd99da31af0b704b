// Package vsock listens on AF_VSOCK, which the net package does not know. On
// Firecracker each connection is a stream by itself.
package vsock

import (
	"net"
	"os"
	"strconv"
	"syscall"
	"unsafe"
)

const (
	// AgentPort is where the host daemon connects to.
	AgentPort = 1024

	family  = 40         // AF_VSOCK
	anyCID  = 0xffffffff // VMADDR_CID_ANY
	backlog = 128
)

// sockaddr is struct sockaddr_vm.
type sockaddr struct {
	family   uint16
	_        uint16
	port     uint32
	cid      uint32
	flags    uint8
	reserved [3]uint8
}

// Addr is a port of this machine.
type Addr uint32

// Network implements net.Addr.
func (Addr) Network() string { return "vsock" }

func (a Addr) String() string { return strconv.FormatUint(uint64(a), 10) }

// Listener accepts connections from the host.
type Listener struct {
	file *os.File
	raw  syscall.RawConn
	port Addr
}

// Listen fails on kernels and machines without vsock.
func Listen(port uint32) (*Listener, error) {
	if _, err := os.Stat("/dev/vsock"); err != nil {
		return nil, err
	}
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	address := sockaddr{family: family, port: port, cid: anyCID}
	_, _, errno := syscall.Syscall(syscall.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&address)), unsafe.Sizeof(address))
	if errno == 0 {
		err = syscall.Listen(fd, backlog)
	} else {
		err = errno
	}
	if err != nil {
		syscall.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return fromDescriptor(fd, port)
}

func fromDescriptor(fd int, port uint32) (*Listener, error) {
	file := os.NewFile(uintptr(fd), "vsock:"+Addr(port).String())
	raw, err := file.SyscallConn()
	return &Listener{file, raw, Addr(port)}, err
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	var fd uintptr
	var errno syscall.Errno
	err := l.raw.Read(func(listener uintptr) bool {
		fd, _, errno = syscall.Syscall6(syscall.SYS_ACCEPT4, listener, 0, 0, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0, 0)
		return errno != syscall.EAGAIN
	})
	if err != nil {
		return nil, net.ErrClosed
	}
	if errno != 0 {
		return nil, acceptError{errno}
	}
	return &conn{os.NewFile(fd, "vsock"), l.port}, nil
}

// Close implements net.Listener.
func (l *Listener) Close() error { return l.file.Close() }

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.port }

// acceptError is temporary for net/http, which then tries again: a restored
// machine's transport is reset, and the listener must survive that.
type acceptError struct{ syscall.Errno }

func (acceptError) Temporary() bool { return true }
func (acceptError) Timeout() bool   { return false }

// conn is a connection; os.File brings reads, writes and deadlines.
type conn struct {
	*os.File
	port Addr
}

func (c *conn) LocalAddr() net.Addr  { return c.port }
func (c *conn) RemoteAddr() net.Addr { return c.port }

// CloseWrite half-closes, so that net/http ends answers in order.
func (c *conn) CloseWrite() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { err = syscall.Shutdown(int(fd), syscall.SHUT_WR) })
}
