package vsock

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// No test machine has a vsock loopback, so what goes over the wire is shown on
// a Unix socket: accepting and moving bytes is the same for every family.
func unixListener(t *testing.T) (*Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 5)); err != nil {
		t.Fatal(err)
	}
	l, err := fromDescriptor(fd, 7)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

func TestConnections(t *testing.T) {
	l, path := unixListener(t)
	go func() {
		client, err := net.Dial("unix", path)
		if err != nil {
			return
		}
		defer client.Close()
		io.WriteString(client, "ping")
		got, _ := io.ReadAll(client)
		client.Write(got)
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 4)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "ping" {
		t.Fatal(string(buf), err)
	}
	c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := c.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("deadline: %v", err)
	}
	c.SetReadDeadline(time.Time{})
	io.WriteString(c, "pong")
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "pong" || err != nil {
		t.Fatalf("after the half-close: %q %v", got, err)
	}
	if c.LocalAddr().String() != "7" || c.RemoteAddr().Network() != "vsock" {
		t.Error("addresses")
	}
}

func TestCloseEndsAccept(t *testing.T) {
	l, _ := unixListener(t)
	go func() {
		time.Sleep(10 * time.Millisecond)
		l.Close()
	}()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("got %v", err)
	}
}

func TestListenBindsAVsockPort(t *testing.T) {
	l, err := Listen(1 << 20)
	if err != nil {
		t.Skip("no vsock here: ", err)
	}
	defer l.Close()
	if _, err := Listen(1 << 20); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the port is free although it is bound: %v", err)
	}
}
