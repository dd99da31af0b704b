// Package process starts commands and looks after them to the end: users,
// pipes, terminals, time limits, exit statuses, retained output.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"fused/internal/account"
	"fused/internal/cgroup"
	"fused/internal/console"
	"fused/internal/fault"
	"fused/internal/reap"
)

const (
	timeoutCode = 124 // as timeout(1) has it
	// hangUpGrace is the time between SIGHUP and SIGKILL when a client has gone.
	hangUpGrace = 2 * time.Second
)

// Exit is how a command ended.
type Exit struct {
	ExitCode   int    `json:"exit_code"`
	Signal     string `json:"signal,omitempty"`
	TimedOut   bool   `json:"timed_out"`
	DurationMS int64  `json:"duration_ms"`
}

// Launcher starts commands.
type Launcher struct {
	Reaper  *reap.Reaper
	Cgroups *cgroup.Tree // nil: process groups have to do
	running atomic.Int64
}

// Running is the number of commands that have not ended.
func (l *Launcher) Running() int { return int(l.running.Load()) }

// Options say what a command is connected to.
type Options struct {
	Stdin     []byte // written first
	KeepStdin bool   // leave the pipe open after Stdin
	UseStdin  bool   // false: /dev/null
	TTY       bool
	Rows      int
	Cols      int
	Timeout   time.Duration
	Stdout    Sink // all output of a terminal
	Stderr    Sink
	// Started, if not nil, is called before the first output is delivered.
	Started func(*Command)
}

// Command is one running or ended command.
type Command struct {
	PID int

	launcher *Launcher
	child    *reap.Child
	group    *cgroup.Group
	terminal *Terminal
	input    *Input
	outputs  []*output
	started  time.Time
	limit    *time.Timer
	overtime atomic.Bool
	finished chan struct{}
	exit     Exit
}

// Start starts a command. It runs until it ends by itself or by Kill.
func (l *Launcher) Start(spec Spec, opts Options) (*Command, error) {
	c := &Command{launcher: l, finished: make(chan struct{})}
	ends, err := c.connect(spec, opts)
	if err == nil {
		err = c.fork(spec, ends)
	}
	for _, file := range ends {
		file.Close()
	}
	if err != nil {
		c.disconnect()
		return nil, err
	}
	l.running.Add(1)
	if opts.Timeout > 0 {
		c.limit = time.AfterFunc(opts.Timeout, func() {
			c.overtime.Store(true)
			c.Kill()
		})
	}
	if opts.Started != nil {
		opts.Started(c)
	}
	c.run(opts)
	return c, nil
}

// connect makes the pipes or the terminal; the returned files are the
// command's standard input, output and error.
func (c *Command) connect(spec Spec, opts Options) ([]*os.File, error) {
	if opts.TTY {
		return c.connectTerminal(spec, opts)
	}
	var ends []*os.File
	stdin, err := c.connectInput(opts)
	if err != nil {
		return nil, err
	}
	ends = append(ends, stdin)
	for range 2 {
		reader, writer, err := pipe(readEnd)
		if err != nil {
			return ends, err
		}
		ends = append(ends, writer)
		out, err := newOutput(reader, false)
		if err != nil {
			return ends, err
		}
		c.outputs = append(c.outputs, out)
	}
	return ends, nil
}

func (c *Command) connectInput(opts Options) (*os.File, error) {
	if !opts.UseStdin {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	reader, writer, err := pipe(writeEnd)
	if err == nil {
		c.input = &Input{file: writer}
	}
	return reader, err
}

func (c *Command) connectTerminal(spec Spec, opts Options) ([]*os.File, error) {
	terminal, slave, err := newTerminal(opts.Rows, opts.Cols, spec.User.UID)
	if err != nil {
		return nil, err
	}
	c.terminal = terminal
	c.input = &Input{file: terminal.master, terminal: true}
	out, err := newOutput(terminal.master, true)
	c.outputs = []*output{out}
	return []*os.File{slave}, err
}

func (c *Command) disconnect() {
	if c.input != nil {
		c.input.abandon()
	}
	for _, out := range c.outputs {
		out.file.Close()
	}
}

const (
	readEnd  = 0
	writeEnd = 1
)

// pipe makes a pipe whose end "ours" is non-blocking; the other is the child's,
// and programs expect blocking ones.
func pipe(ours int) (reader, writer *os.File, err error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	syscall.SetNonblock(fds[ours], true)
	return os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1"), nil
}

func (c *Command) fork(spec Spec, ends []*os.File) error {
	group, err := c.launcher.Cgroups.New()
	if err != nil {
		return fmt.Errorf("make a cgroup: %w", err)
	}
	attr := &syscall.ProcAttr{Dir: spec.Dir, Env: spec.Env, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: c.terminal != nil}}
	for i := range 3 {
		attr.Files = append(attr.Files, ends[min(i, len(ends)-1)].Fd())
	}
	if os.Geteuid() == 0 {
		attr.Sys.Credential = &syscall.Credential{Uid: spec.User.UID, Gid: spec.User.GID, Groups: spec.User.Groups}
	}
	group.Attach(attr.Sys)
	c.started = time.Now()
	c.child, err = c.launcher.Reaper.Start(func() (int, error) {
		return syscall.ForkExec(spec.Path, spec.Argv, attr)
	})
	group.Forked()
	if err != nil {
		group.Release()
		return startFault(spec, err)
	}
	c.PID, c.group = c.child.PID, group
	return nil
}

// startFault translates what fork, chdir or exec said; the kernel does not tell
// which of them it was.
func startFault(spec Spec, err error) error {
	switch {
	case errors.Is(err, syscall.E2BIG):
		return fault.BadRequest("cmd", "the command and its environment are longer than the kernel accepts")
	case errors.Is(err, syscall.EACCES) && mayExecute(spec):
		return badCwd(spec.Dir)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return fmt.Errorf("start %s: %w", spec.Path, err)
	}
	text := fmt.Sprintf("cannot execute %s: %v (is it a program for this machine, with its interpreter?)", spec.Path, err)
	return fault.New("command_not_found", text, "command", spec.Argv[0])
}

// mayExecute reports whether the mode bits of the program let the user run it.
func mayExecute(spec Spec) bool {
	info, err := os.Stat(spec.Path)
	if err != nil {
		return false
	}
	if spec.User.UID == 0 {
		return info.Mode().Perm()&0o111 != 0
	}
	return allows(info, spec.User)
}

// mayEnter reports whether the mode bits of a folder and of those above it let
// the user in.
func mayEnter(dir string, user account.User) bool {
	if user.UID == 0 {
		return true
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false
	}
	for ; ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err != nil || !allows(info, user) {
			return false
		}
		if dir == "/" {
			return true
		}
	}
}

// allows looks at the bit for executing, or entering, that counts for a user
// who is not root.
func allows(info os.FileInfo, user account.User) bool {
	stat, mode := info.Sys().(*syscall.Stat_t), info.Mode().Perm()
	if user.UID == stat.Uid {
		return mode&0o100 != 0
	}
	for _, gid := range append([]uint32{user.GID}, user.Groups...) {
		if gid == stat.Gid {
			return mode&0o010 != 0
		}
	}
	return mode&0o001 != 0
}

// run starts the goroutines that move bytes and wait for the end.
func (c *Command) run(opts Options) {
	sinks := []Sink{opts.Stdout, opts.Stderr}
	for i, out := range c.outputs {
		console.Go("output", func() { out.pump(sinks[i]) })
	}
	if c.input != nil && (len(opts.Stdin) > 0 || !opts.KeepStdin) {
		c.feed(opts.Stdin, !opts.KeepStdin)
	}
	console.Go("command", c.wait)
}

// feed writes the first input. It takes its turn before anybody else can know
// the command.
func (c *Command) feed(data []byte, eof bool) {
	c.input.turn.Lock()
	console.Go("input", func() {
		defer c.input.turn.Unlock()
		// A command that does not want its input is no error.
		c.input.append(context.Background(), bytes.NewReader(data), eof)
	})
}

// wait collects the exit status, takes the output that is left and records the
// end. The status is known first: output never makes it wait, nor get lost.
func (c *Command) wait() {
	<-c.child.Done()
	ended := time.Now()
	if c.limit != nil {
		c.limit.Stop()
	}
	for _, out := range c.outputs {
		out.finish()
	}
	if c.input != nil {
		c.input.abandon()
	}
	for _, out := range c.outputs {
		<-out.done
		out.file.Close()
	}
	c.group.Release()
	c.exit = c.exitOf(c.child.Status(), ended.Sub(c.started))
	c.launcher.running.Add(-1)
	close(c.finished)
}

func (c *Command) exitOf(status syscall.WaitStatus, duration time.Duration) Exit {
	exit := Exit{ExitCode: status.ExitStatus(), DurationMS: duration.Milliseconds()}
	if status.Signaled() {
		exit.ExitCode = 128 + int(status.Signal())
		exit.Signal = SignalName(status.Signal())
	}
	// A command that ended by itself while the limit struck keeps its status.
	if c.overtime.Load() && status.Signaled() && status.Signal() == syscall.SIGKILL {
		exit.ExitCode, exit.Signal, exit.TimedOut = timeoutCode, "", true
	}
	return exit
}

// Finished is closed when the command has ended and its output was delivered.
func (c *Command) Finished() <-chan struct{} { return c.finished }

// Exit waits for the end.
func (c *Command) Exit() Exit {
	<-c.finished
	return c.exit
}

// Input is nil when standard input is /dev/null.
func (c *Command) Input() *Input { return c.input }

// Resize changes the terminal's size; nothing without a terminal.
func (c *Command) Resize(rows, cols int) {
	if c.terminal != nil {
		c.terminal.Resize(rows, cols)
	}
}

// Signal sends a signal to the terminal's foreground group, else to the
// command's group.
func (c *Command) Signal(sig syscall.Signal) error {
	if c.terminal != nil {
		if group, err := c.terminal.Foreground(); err == nil && group > 1 {
			return syscall.Kill(-group, sig)
		}
	}
	return c.child.Signal(sig, true)
}

// Kill ends the whole process tree.
func (c *Command) Kill() {
	if c.group != nil {
		c.group.Kill()
		return
	}
	c.child.Signal(syscall.SIGKILL, true)
	for _, pid := range sessionMembers(c.PID) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// Members returns the processes that are left of the command's tree, itself
// included; also after its end.
func (c *Command) Members() []int {
	if c.group != nil {
		return c.group.Processes()
	}
	return sessionMembers(c.PID)
}

// HangUp ends the command as a closed terminal would: SIGHUP to its session, and
// SIGKILL to what is left after a moment.
func (c *Command) HangUp() {
	for _, pid := range c.Members() {
		syscall.Kill(pid, syscall.SIGHUP)
		syscall.Kill(pid, syscall.SIGCONT) // a stopped process would never see it
	}
	time.AfterFunc(hangUpGrace, c.Kill)
}

// sessionMembers finds the processes of a session where no cgroup knows them.
func sessionMembers(session int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var members []int
	for _, path := range stats {
		text, _ := os.ReadFile(path)
		// The name in parentheses may contain anything; the fields behind it
		// are: state, parent, group, session.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil && len(fields) > 3 && fields[3] == strconv.Itoa(session) && fields[0] != "Z" {
			members = append(members, pid)
		}
	}
	return members
}
