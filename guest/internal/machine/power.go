package machine

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"fused/internal/console"
)

// kernel is the power of the machine that PID 1 runs in.
type kernel struct{}

func (kernel) now() time.Time            { return time.Now() }
func (kernel) pause(d time.Duration)     { time.Sleep(d) }
func (kernel) signal(sig syscall.Signal) { syscall.Kill(-1, sig) }
func (kernel) sync()                     { syscall.Sync() }
func (kernel) restart()                  { Restart() }

func (kernel) anyProcess() bool {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil && pid > 1 && inUserSpace(entry.Name()) {
			return true
		}
	}
	return false
}

func (kernel) makeReadOnly(disk string) error {
	return syscall.Mount("", disk, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
}

// inUserSpace tells processes from kernel threads, which have no program.
func inUserSpace(pid string) bool {
	_, err := os.Readlink(filepath.Join("/proc", pid, "exe"))
	return err == nil
}

// Restart leaves the kernel by a restart, which ends a VMM that was told not to
// reboot. It does not return on success.
func Restart() {
	drainConsole()
	if err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART); err != nil {
		console.Printf("reboot: %v", err)
	}
}

// drainConsole waits until the last lines have left the serial port.
func drainConsole() {
	const tcsbrk, drain = 0x5409, 1 // with an argument other than 0 it only drains
	syscall.Syscall(syscall.SYS_IOCTL, os.Stderr.Fd(), tcsbrk, drain)
}
