// Package reap owns every wait for a child process. PID 1 inherits orphans, so
// somebody must wait for any process, and whoever does would steal the status
// that others wait for: therefore nothing else in the agent waits.
package reap

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"fused/internal/console"
)

// Reaper collects the statuses of children.
type Reaper struct {
	// mu is held around fork and around wait: a child that ends at once is
	// known before its status is collected. It also covers signals, so that
	// none goes to a number that is no longer ours.
	mu       sync.Mutex
	children map[int]*Child
	all      bool
	orphaned func()
	signals  chan os.Signal
	done     chan struct{}
}

// Child is one process that the agent has started.
type Child struct {
	PID    int
	reaper *Reaper
	status syscall.WaitStatus
	done   chan struct{}
}

// New starts a reaper. With all it collects every child, orphans included,
// which is the duty of PID 1; without, only those that it has started.
// orphaned, if not nil, is called after orphans were collected.
func New(all bool, orphaned func()) *Reaper {
	r := &Reaper{
		children: map[int]*Child{}, all: all, orphaned: orphaned,
		signals: make(chan os.Signal, 1), done: make(chan struct{}),
	}
	signal.Notify(r.signals, syscall.SIGCHLD)
	console.Go("reaper", r.loop)
	return r
}

// Stop ends the reaper's goroutine; children stay as they are.
func (r *Reaper) Stop() {
	signal.Stop(r.signals)
	close(r.done)
}

// Start runs fork, which returns the new process's number and must not wait.
func (r *Reaper) Start(fork func() (int, error)) (*Child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := fork()
	if err != nil {
		return nil, err
	}
	child := &Child{PID: pid, reaper: r, done: make(chan struct{})}
	r.children[pid] = child
	return child, nil
}

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Status is valid after Done.
func (c *Child) Status() syscall.WaitStatus { return c.status }

// Signal sends a signal to the process's group (group true) or to itself.
// ESRCH when it has ended: its number may belong to somebody else.
func (c *Child) Signal(sig syscall.Signal, group bool) error {
	c.reaper.mu.Lock()
	defer c.reaper.mu.Unlock()
	if c.reaper.children[c.PID] != c {
		return syscall.ESRCH
	}
	if group {
		return syscall.Kill(-c.PID, sig)
	}
	return syscall.Kill(c.PID, sig)
}

func (r *Reaper) loop() {
	for {
		select {
		case <-r.signals:
			if r.collect() && r.orphaned != nil {
				r.orphaned()
			}
		case <-r.done:
			return
		}
	}
}

// collect takes all statuses there are; true if an orphan was among them.
func (r *Reaper) collect() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.all {
		for pid := range r.children {
			r.wait(pid)
		}
		return false
	}
	orphans := false
	for {
		pid, known := r.wait(-1)
		if pid <= 0 {
			return orphans
		}
		orphans = orphans || !known
	}
}

func (r *Reaper) wait(which int) (pid int, known bool) {
	var status syscall.WaitStatus
	for {
		var err error
		pid, err = syscall.Wait4(which, &status, syscall.WNOHANG, nil)
		if err != syscall.EINTR {
			break
		}
	}
	if pid <= 0 {
		return pid, false
	}
	child := r.children[pid]
	if child != nil {
		delete(r.children, pid)
		child.status = status
		close(child.done)
	}
	return pid, child != nil
}
