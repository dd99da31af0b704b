package machine

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"fused/internal/console"
)

// An orderly end takes less than two seconds, whatever the processes do.
const (
	termGrace = time.Second
	killGrace = 500 * time.Millisecond
	pollEvery = 10 * time.Millisecond // only while shutting down
)

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

// Shutdown ends every process, makes the disks clean and restarts. Only for
// PID 1. disks are the mounted writable file systems besides the root.
func Shutdown(disks []string) {
	console.Printf("shutting down")
	syscall.Kill(-1, syscall.SIGTERM)
	syscall.Kill(-1, syscall.SIGCONT)
	if !waitForNone(termGrace) {
		syscall.Kill(-1, syscall.SIGKILL)
		waitForNone(killGrace)
	}
	syscall.Sync()
	for _, disk := range append([]string{"/"}, disks...) {
		if err := syscall.Mount("", disk, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
			console.Printf("remount %s read-only: %v", disk, err)
		}
	}
	Restart()
}

// waitForNone waits until no process of user space is left but PID 1.
func waitForNone(limit time.Duration) bool {
	for until := time.Now().Add(limit); time.Now().Before(until); time.Sleep(pollEvery) {
		if !anyProcess() {
			return true
		}
	}
	return !anyProcess()
}

func anyProcess() bool {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil && pid > 1 && inUserSpace(entry.Name()) {
			return true
		}
	}
	return false
}

// inUserSpace tells processes from kernel threads, which have no program.
func inUserSpace(pid string) bool {
	_, err := os.Readlink(filepath.Join("/proc", pid, "exe"))
	return err == nil
}
