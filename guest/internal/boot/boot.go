// Package boot turns an initramfs with nothing but the agent into a machine:
// docs/guest-protocol.md, section 5. It runs once, as PID 1, and ends the
// machine with a line that names what is missing.
package boot

import (
	"net"
	"os"
	"syscall"

	"fused/internal/cgroup"
	"fused/internal/console"
	"fused/internal/machine"
)

// cgroupRoot is where commands run; the agent itself stays outside.
const cgroupRoot = "/sys/fs/cgroup/user"

// Machine is what boot hands to the agent.
type Machine struct {
	Params  Params
	Phases  *machine.Phases
	Names   machine.Names
	Cgroups *cgroup.Tree
	Disks   []string // writable file systems besides the root, for the shutdown
	// Exactly one of the two is set: a port for the multiplexer, or a listener
	// whose connections are streams by themselves.
	Port     string
	Listener net.Listener
}

// Run boots. On failure it writes the reason to the console and ends the machine.
func Run() *Machine {
	m, err := run()
	if err != nil {
		console.Printf("FATAL: %v", err)
		machine.Restart()
		select {} // PID 1 must not return
	}
	return m
}

func run() (*Machine, error) {
	syscall.Umask(0o022)
	m := &Machine{Phases: &machine.Phases{}}
	if err := mountKernelFilesystems(); err != nil {
		return nil, err
	}
	takeConsole()
	prepareKernel()
	commandLine, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	if m.Params, err = ParseParams(string(commandLine)); err != nil {
		return nil, err
	}
	if m.Cgroups, err = cgroup.Open(cgroupRoot); err != nil {
		return nil, err
	}
	m.Phases.Done("init")
	return m, m.bringUp()
}

// bringUp is everything that needs drivers.
func (m *Machine) bringUp() error {
	events := openEvents()
	defer events.Close()
	if err := loadModules("/modules"); err != nil {
		return err
	}
	m.Phases.Done("modules")
	disks, err := m.mountRoot()
	if err != nil {
		return err
	}
	m.Disks = disks
	m.Phases.Done("root")
	if err := m.network(); err != nil {
		return err
	}
	m.Phases.Done("network")
	return m.findChannel(events)
}

// takeConsole makes /dev/console the standard output and error. The kernel
// gives none to an initramfs without the node.
func takeConsole() {
	fd, err := syscall.Open("/dev/console", syscall.O_WRONLY|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return // a machine without a console has nobody to talk to
	}
	syscall.Dup3(fd, 1, 0)
	syscall.Dup3(fd, 2, 0)
	syscall.Close(fd)
}

// prepareKernel applies settings that make a machine behave when it is in
// trouble; none of them is worth failing for.
func prepareKernel() {
	// A kernel panic ends the machine at once, so that the host notices.
	os.WriteFile("/proc/sys/kernel/panic", []byte("-1"), 0)
	// The kernel's defaults for PID 1 are from another age. Commands inherit
	// these limits.
	const softFiles, hardFiles = 65536, 1048576
	syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: softFiles, Max: hardFiles})
}
