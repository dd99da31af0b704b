package port

import (
	"bytes"
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"fused/internal/mux"
)

// pair returns a port over a socket, which like the device reports its peer's
// end by reads of 0 bytes, and the peer.
func pair(t *testing.T) (*Virtio, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	v, err := FromDescriptor(fds[0], "port")
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	t.Cleanup(func() { v.Close(); peer.Close() })
	return v, peer
}

func TestWritesLargerThanTheQueueWait(t *testing.T) {
	v, peer := pair(t)
	data := bytes.Repeat([]byte("0123456789"), 100000)
	done := make(chan error, 1)
	go func() {
		n, err := v.Write(data)
		if err == nil && n != len(data) {
			err = io.ErrShortWrite
		}
		done <- err
	}()
	time.Sleep(10 * time.Millisecond)
	got := make([]byte, len(data))
	if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, data) {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestAHangUpIsReportedOnceAndThenSleptOver(t *testing.T) {
	v, peer := pair(t)
	peer.Write([]byte("x"))
	buf := make([]byte, 10)
	if n, err := v.Read(buf); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	peer.Close()
	if _, err := v.Read(buf); !errors.Is(err, mux.ErrNoHost) {
		t.Fatalf("got %v", err)
	}
	var before, after syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	woken := make(chan error, 1)
	go func() { _, err := v.Read(buf); woken <- err }()
	select {
	case err := <-woken:
		t.Fatalf("a second report: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	if used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()); used > 50*time.Millisecond {
		t.Errorf("%v of CPU time while nobody is connected", used)
	}
	v.Close()
	if err := <-woken; err == nil || errors.Is(err, mux.ErrNoHost) {
		t.Errorf("after Close: %v", err)
	}
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	if _, err := OpenVirtio("/dev/no-such-port"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
