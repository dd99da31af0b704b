package boot

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"fused/internal/vsock"
)

const (
	portName = "fuse.agent"
	// channelPatience covers slow hosts; the usual wait is none at all.
	channelPatience = 10 * time.Second
	// eventGap bounds the wait for one kernel event, in case one was missed.
	eventGap = 50 * time.Millisecond
)

// findChannel waits for the port named fuse.agent or, on machines without one,
// listens on vsock. The host names ports by messages that arrive a little
// after the driver has started.
func (m *Machine) findChannel(events *events) error {
	for until := time.Now().Add(channelPatience); ; events.Wait(eventGap) {
		if m.Port = namedPort("/sys/class/virtio-ports"); m.Port != "" {
			return nil
		}
		// Drivers probe while they are loaded: a serial device that is not
		// there now will not come.
		if !hasSerialDevice("/sys/bus/virtio/drivers/virtio_console") {
			listener, err := vsock.Listen(vsock.AgentPort)
			if err != nil {
				return errNoChannel
			}
			m.Listener = listener
			return nil
		}
		if time.Now().After(until) {
			return errNoChannel
		}
	}
}

var errNoChannel = errors.New("no virtio-serial port named " + portName + " and no vsock device; " +
	"does the initramfs hold the kernel's modules virtio_mmio or virtio_pci, and virtio_console?")

func namedPort(sysPorts string) string {
	if _, err := os.Stat("/dev/virtio-ports/" + portName); err == nil {
		return "/dev/virtio-ports/" + portName
	}
	names, _ := filepath.Glob(filepath.Join(sysPorts, "*", "name"))
	for _, path := range names {
		text, _ := os.ReadFile(path)
		if strings.TrimSpace(string(text)) == portName {
			return "/dev/" + filepath.Base(filepath.Dir(path))
		}
	}
	return ""
}

func hasSerialDevice(driver string) bool {
	devices, _ := filepath.Glob(filepath.Join(driver, "virtio*"))
	return len(devices) > 0
}

// events are the kernel's messages about devices that come and go.
type events struct{ fd int }

func openEvents() *events {
	const kobjectUevent, kernelGroup = 15, 1
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, kobjectUevent)
	if err != nil {
		return &events{-1}
	}
	syscall.Bind(fd, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK, Groups: kernelGroup})
	return &events{fd}
}

// Wait returns when something has changed, at the latest after limit.
func (e *events) Wait(limit time.Duration) {
	if e.fd < 0 {
		time.Sleep(limit)
		return
	}
	timeout := syscall.NsecToTimeval(int64(limit))
	syscall.SetsockoptTimeval(e.fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &timeout)
	syscall.Recvfrom(e.fd, make([]byte, 8192), 0)
}

// Close ends the subscription.
func (e *events) Close() {
	if e.fd >= 0 {
		syscall.Close(e.fd)
	}
}
