// Command fused is the guest agent: PID 1 of every machine. Started as an
// ordinary process it serves the same routes on a Unix socket, for tests and
// for trying things out.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"fused/internal/agent"
	"fused/internal/boot"
	"fused/internal/cgroup"
	"fused/internal/console"
	"fused/internal/machine"
	"fused/internal/mux"
	"fused/internal/port"
	"fused/internal/process"
	"fused/internal/reap"
)

// version is set by the linker.
var version = "dev"

const usage = `usage: fused serve --unix PATH   one HTTP connection per socket connection
       fused serve --mux PATH    the multiplexer, for one socket connection at a time
       fused version
As PID 1 fused boots the machine.`

func main() {
	// A small heap that grows slowly: the memory belongs to the user.
	debug.SetGCPercent(50)
	if os.Getpid() == 1 {
		pid1()
		return
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fused:", err)
		os.Exit(1)
	}
}

// pid1 never returns: the kernel would panic.
func pid1() {
	defer func() {
		if cause := recover(); cause != nil {
			console.Printf("FATAL: panic: %v\n%s", cause, debug.Stack())
			machine.Restart()
			select {}
		}
	}()
	withstandSignals()
	m := boot.Run()
	limitMemory()
	listener := m.Listener
	if listener == nil {
		device, err := port.OpenVirtio(m.Port)
		if err != nil {
			console.Printf("FATAL: %v", err)
			machine.Restart()
			select {}
		}
		listener = mux.NewSession(device)
	}
	reaper := reap.New(true, m.Cgroups.Sweep)
	a := agent.New(agent.Config{
		Version: version, Nonce: m.Params.Nonce, Phases: m.Phases, Names: m.Names, Owned: true,
		Launcher: &process.Launcher{Reaper: reaper, Cgroups: m.Cgroups},
		Shutdown: func() { machine.Shutdown(m.Disks) },
		Folder:   boot.FuseFolder,
		Disks:    m.Disks,
	})
	m.Phases.Done("channel")
	console.Printf("ready after %d ms", machine.Uptime().Milliseconds())
	err := a.Serve(listener)
	console.Printf("FATAL: the channel has failed: %v", err)
	a.End()
	select {}
}

// withstandSignals takes every signal whose default in the Go runtime would
// end the process. Ignoring them instead would be inherited by all commands.
func withstandSignals() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals,
		syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGBUS,
		syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGTERM, syscall.SIGSTKFLT, syscall.SIGSYS, syscall.SIGPIPE)
	console.Go("signals", func() {
		for range signals {
		}
	})
}

// limitMemory makes the collector work harder before the agent takes more than
// a quarter of the machine.
func limitMemory() {
	if total := machine.MemoryBytes(); total > 0 {
		debug.SetMemoryLimit(total / 4)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "version":
		fmt.Println(version)
		return nil
	case len(args) == 3 && args[0] == "serve" && args[1] == "--unix":
		return serveUnix(args[2])
	case len(args) == 3 && args[0] == "serve" && args[1] == "--mux":
		return serveMux(args[2])
	}
	return errors.New(usage)
}

// newAgent is the agent as an ordinary process: it changes nothing of the
// machine, and a shutdown ends only itself.
func newAgent() *agent.Agent {
	phases := &machine.Phases{}
	phases.Done("channel")
	launcher := &process.Launcher{Reaper: reap.New(false, nil)}
	if root := os.Getenv("FUSED_CGROUP"); root != "" {
		tree, err := cgroup.Open(root)
		if err != nil {
			console.Printf("no cgroups: %v", err)
		}
		launcher.Cgroups = tree
	}
	return agent.New(agent.Config{
		Version: version, Nonce: os.Getenv("FUSED_NONCE"), Phases: phases, Launcher: launcher,
		Shutdown: func() { os.Exit(0) },
		Folder:   os.Getenv("FUSED_FOLDER"),
	})
}

func serveUnix(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	return newAgent().Serve(listener)
}

// serveMux speaks the multiplexer with whoever connects, one after the other,
// as QEMU's socket for a port does.
func serveMux(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	a := newAgent()
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		session := mux.NewSession(conn)
		a.Serve(session)
		session.Close()
	}
}
