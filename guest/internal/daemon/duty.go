package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"syscall"
	"time"

	"fused/internal/download"
	"fused/internal/fault"
	"fused/internal/process"
)

const (
	// membersEvery is how often an ending tree is looked at: the kernel tells of
	// the first process's end only.
	membersEvery = 20 * time.Millisecond
	lastWords    = 200
)

// duty is one order while it is carried out: by the goroutine of run, and by
// that of drain.
type duty struct {
	s     *Supervisor
	order Order

	// retired ends when nothing may be started or fetched any more.
	retired context.Context
	retire  context.CancelFunc

	endOnce sync.Once
	ending  chan struct{} // closed: what runs is to end
	killAt  time.Time     // valid after ending
	kill    context.CancelFunc
	killing context.Context // ends when there is no time left, whatever killAt says
	over    chan struct{}   // closed: nothing runs any more

	before *duty // guarded by s.mu; nil when nothing of it is left

	draining bool // guarded by s.mu
	drained  chan struct{}
	answer   Answer // valid after drained

	exitCode *int // valid after over: of its last end
	killed   bool // valid after over: it did not end by itself
}

func newDuty(s *Supervisor, order Order, before *duty) *duty {
	d := &duty{s: s, order: order, before: before, ending: make(chan struct{}), over: make(chan struct{}), drained: make(chan struct{})}
	d.retired, d.retire = context.WithCancel(context.Background())
	d.killing, d.kill = context.WithCancel(context.Background())
	return d
}

// end asks what runs to end, and kills what is left at a moment.
func (d *duty) end(killAt time.Time) {
	d.endOnce.Do(func() {
		d.retire()
		d.killAt = killAt
		close(d.ending)
	})
}

// conclude waits until nothing of an older order is left: the end of its drain,
// if that has begun.
func (d *duty) conclude() {
	d.s.mu.Lock()
	draining := d.draining
	d.s.mu.Unlock()
	if draining {
		<-d.drained
		return
	}
	d.end(time.Now().Add(stopGrace))
	<-d.over
}

func (d *duty) run(before *duty) {
	defer close(d.over)
	if before != nil {
		before.conclude()
		d.s.mu.Lock()
		d.before = nil
		d.s.mu.Unlock()
	}
	if d.order.DownloadURL != "" {
		order := download.Order{URL: d.order.DownloadURL, SHA256: d.order.SHA256, Path: d.s.program()}
		if err := download.Fetch(d.retired, order, d.s.config.Limits); err != nil && d.retired.Err() == nil {
			d.settle(Failed, err.Error())
			return
		}
	}
	d.live()
}

// live starts the daemon again and again, as the order wants it.
func (d *duty) live() {
	var pause time.Duration
	message := ""
	for restarts := 0; d.retired.Err() == nil; restarts++ {
		begun := time.Now()
		var again bool
		if again, message = d.liveOnce(restarts, message); !again {
			return
		}
		pause = d.s.config.Pace.after(pause, time.Since(begun))
		d.settle(Starting, fmt.Sprintf("%s; it is started again after %v", message, pause))
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-d.retired.Done():
		}
		timer.Stop()
	}
	if message == "" {
		message = "it was ended before it ran"
	}
	d.settle(Exited, message)
}

// liveOnce is one life after a number of others, the last of which ended as
// before says. It says whether another one follows, and how this one ended.
func (d *duty) liveOnce(restarts int, before string) (again bool, message string) {
	command, err := d.start()
	if err != nil {
		if message = err.Error(); errors.As(err, new(*fault.Fault)) {
			d.settle(Failed, message) // as it will be the next time
			return false, message
		}
		return true, message
	}
	d.s.change(d, func(s *Status) { s.State, s.Restarts, s.Message = Running, restarts, before })
	select {
	case <-command.Finished():
	case <-d.ending:
		d.killed = d.terminate(command)
	case <-d.s.left:
	}
	select {
	case <-d.s.left: // its tree has its own time to end, as long as the machine's
		return false, ""
	default:
	}
	// What it leaves behind would hold its ports and files.
	command.Kill()
	exit := command.Exit()
	d.exitCode, message = &exit.ExitCode, describe(exit)
	next := Exited
	if again = d.retired.Err() == nil && (d.order.Restart == Always || d.order.Restart == OnFailure && exit.ExitCode != 0); again {
		next = Starting
	}
	d.s.change(d, func(s *Status) { s.State, s.ExitCode, s.Message = next, d.exitCode, message })
	return again, message
}

func describe(exit process.Exit) string {
	if exit.Signal != "" {
		return "it was ended by the signal " + exit.Signal
	}
	return fmt.Sprintf("it ended with exit code %d", exit.ExitCode)
}

func (d *duty) settle(state, message string) {
	d.s.change(d, func(s *Status) { s.State, s.Message = state, message })
}

func (d *duty) start() (*process.Command, error) {
	spec, err := d.resolve(d.order.Command)
	if err != nil {
		return nil, err
	}
	return d.s.config.Launcher.Start(spec, process.Options{Stdout: d.s.rings[0].Write, Stderr: d.s.rings[1].Write})
}

// resolve makes the command with the daemon's user, folder and environment.
func (d *duty) resolve(argv []string) (process.Spec, error) {
	env := credentials(d.s.config.Folder)
	maps.Copy(env, d.order.Env)
	return d.s.config.Resolve(process.Request{Cmd: argv, Env: env, User: "root"})
}

// terminate ends a command's whole tree: politely first, by force at killAt or
// when killing ends. It says whether force was needed.
func (d *duty) terminate(command *process.Command) (killed bool) {
	command.Signal(syscall.SIGTERM)
	command.Signal(syscall.SIGCONT) // a stopped process would never see it
	patience, cancel := context.WithDeadline(d.killing, d.killAt)
	defer cancel()
	look := time.NewTicker(membersEvery)
	defer look.Stop()
	finished := command.Finished()
	for {
		select {
		case <-finished:
			finished = nil
			for _, pid := range command.Members() { // those outside of its process group
				syscall.Kill(pid, syscall.SIGTERM)
			}
		case <-look.C:
		case <-patience.Done():
			killed = len(command.Members()) > 0
			command.Kill()
			<-command.Finished()
			return killed
		}
		if finished == nil && len(command.Members()) == 0 {
			return false
		}
	}
}

// drain is the life of a drain. The daemon is retired already.
func (d *duty) drain(limit time.Duration) {
	deadline := time.Now().Add(limit)
	var problems []string
	if problem := d.runDrainCommand(limit * 3 / 4); problem != "" {
		problems = append(problems, problem)
	}
	d.end(deadline)
	<-d.over
	if d.killed {
		problems = append(problems, "the daemon did not end in time and was killed")
	}
	d.answer = Answer{ExitCode: d.exitCode, Message: strings.Join(problems, "; ")}
	d.settle(Drained, d.answer.Message)
	close(d.drained)
}

// runDrainCommand returns what went wrong, in words.
func (d *duty) runDrainCommand(limit time.Duration) string {
	if len(d.order.DrainCommand) == 0 {
		return ""
	}
	spec, err := d.resolve(d.order.DrainCommand)
	if err != nil {
		return "the drain command was not started: " + err.Error()
	}
	tail := &process.Tail{Limit: lastWords}
	sink := func(ring *process.Ring) process.Sink {
		return func(p []byte) { ring.Write(p); tail.Write(p) }
	}
	opts := process.Options{Timeout: max(limit, time.Millisecond), Stdout: sink(d.s.rings[0]), Stderr: sink(d.s.rings[1])}
	command, err := d.s.config.Launcher.Start(spec, opts)
	if err != nil {
		return "the drain command was not started: " + err.Error()
	}
	select {
	case <-command.Finished():
	case <-d.ending: // the machine goes down meanwhile
		command.Kill()
	}
	exit := command.Exit()
	switch {
	case exit.TimedOut:
		return fmt.Sprintf("the drain command was not done after %v and was killed%s", limit, tail.Words())
	case exit.Signal != "":
		return "the drain command was ended by the signal " + exit.Signal + tail.Words()
	case exit.ExitCode != 0:
		return fmt.Sprintf("the drain command ended with exit code %d%s", exit.ExitCode, tail.Words())
	}
	return ""
}
