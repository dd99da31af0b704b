package machine

import (
	"syscall"
	"time"

	"fused/internal/console"
)

// What an orderly end waits for at most, whatever runs in the machine. The host
// has promised its users two seconds for a stop: the rest is for writing back,
// for the kernel's reset and for what the host itself removes.
const (
	// TermGrace is the time between SIGTERM and SIGKILL.
	TermGrace = time.Second
	// killGrace is for what SIGKILL has ended to be gone, its files closed.
	killGrace = 200 * time.Millisecond
	pollEvery = 10 * time.Millisecond
)

// power is what an end acts upon.
type power interface {
	now() time.Time
	pause(time.Duration)
	// signal reaches every process but PID 1.
	signal(syscall.Signal)
	anyProcess() bool
	sync()
	makeReadOnly(disk string) error
	restart()
}

// Shutdown ends every process, makes the disks clean and restarts. Only for
// PID 1. disks are the mounted writable file systems besides the root.
func Shutdown(disks []string) { shutDown(kernel{}, disks) }

// shutDown tells all processes at once, and each only once: many take a second
// SIGTERM for impatience. What cannot end in time is killed, and again as long
// as something starts anew.
func shutDown(p power, disks []string) {
	console.Printf("shutting down")
	told := p.now()
	p.signal(syscall.SIGTERM)
	p.signal(syscall.SIGCONT) // a stopped process would never see it
	if !waitForNone(p, told.Add(TermGrace), func() {}) {
		waitForNone(p, told.Add(TermGrace+killGrace), func() { p.signal(syscall.SIGKILL) })
	}
	p.sync()
	for _, disk := range append([]string{"/"}, disks...) {
		if err := p.makeReadOnly(disk); err != nil {
			console.Printf("remount %s read-only: %v", disk, err)
		}
	}
	p.restart()
}

// waitForNone waits until no process is left, or until the deadline. It acts at
// least once, and before each look.
func waitForNone(p power, deadline time.Time, act func()) bool {
	for {
		act()
		if !p.anyProcess() {
			return true
		}
		if !p.now().Before(deadline) {
			return false
		}
		p.pause(pollEvery)
	}
}
