package daemon

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"fused/internal/console"
	"fused/internal/download"
	"fused/internal/fault"
	"fused/internal/process"
	"fused/internal/setup"
)

// What can be said of a daemon.
const (
	Starting = "starting"
	Running  = "running"
	Exited   = "exited"
	Failed   = "failed"
	Drained  = "drained"
)

const (
	// stopGrace is the time between SIGTERM and SIGKILL when another order comes.
	stopGrace  = 5 * time.Second
	maxDrainMS = 24 * 60 * 60 * 1000
)

// Status is the daemon as GET /state shows it.
type Status struct {
	State    string `json:"state"`
	Restarts int    `json:"restarts"`
	ExitCode *int   `json:"exit_code,omitempty"` // of the last end
	Message  string `json:"message"`
	SinceMS  int64  `json:"since_ms"`
}

// Pace says how soon an ended daemon is started again.
type Pace struct {
	First, Longest time.Duration
	// Settled is the life after which pauses begin with First again.
	Settled time.Duration
}

// UsualPace is that of the protocol.
var UsualPace = Pace{First: time.Second, Longest: 30 * time.Second, Settled: 10 * time.Second}

// after returns the pause after a life, given the pause before it (0: none).
func (p Pace) after(before, life time.Duration) time.Duration {
	if before == 0 || life >= p.Settled {
		return p.First
	}
	return min(2*before, p.Longest)
}

// Config is what a supervisor works with.
type Config struct {
	Launcher *process.Launcher
	// Resolve finds program, user and folder of a command with more variables.
	Resolve func(process.Request) (process.Spec, error)
	// Folder holds the setup's secrets and the downloaded daemon; "": none.
	Folder string
	Limits download.Limits
	Pace   Pace
	// Changed is called after every change of the status.
	Changed func()
}

// Supervisor looks after one daemon at a time.
type Supervisor struct {
	config Config
	rings  [2]*process.Ring

	left chan struct{} // closed: what runs is not ours to end any more

	mu      sync.Mutex
	current *duty // nil: no order came yet
	status  Status
	isLeft  bool
}

// New makes a supervisor without a daemon.
func New(config Config) *Supervisor {
	s := &Supervisor{config: config, rings: [2]*process.Ring{process.NewRing(), process.NewRing()}, left: make(chan struct{})}
	s.closeRings()
	return s
}

func (s *Supervisor) closeRings() {
	for _, ring := range s.rings {
		ring.Close()
	}
}

func (s *Supervisor) program() string {
	if s.config.Folder == "" {
		return ""
	}
	return filepath.Join(s.config.Folder, setup.DaemonName)
}

// Ring returns a stream's retained output; nil for an unknown name.
func (s *Supervisor) Ring(stream string) *process.Ring {
	switch stream {
	case "stdout":
		return s.rings[0]
	case "stderr":
		return s.rings[1]
	}
	return nil
}

// Status returns the order's id and the daemon's status; nil without an order.
func (s *Supervisor) Status() (id string, status *Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == nil {
		return "", nil
	}
	copied := s.status
	return s.current.order.ID, &copied
}

// Put begins an order, once per id. It does not wait for anything.
func (s *Supervisor) Put(order Order) error {
	if err := order.complete(s.program()); err != nil {
		return err
	}
	s.mu.Lock()
	before := s.current
	if before != nil && before.order.ID == order.ID {
		s.mu.Unlock()
		return nil
	}
	d := newDuty(s, order, before)
	if s.isLeft {
		d.retire()
	}
	s.current = d
	s.status = Status{State: Starting, SinceMS: time.Now().UnixMilli()}
	for _, ring := range s.rings {
		ring.Open()
	}
	s.mu.Unlock()
	s.config.Changed()
	console.Go("daemon", func() { d.run(before) })
	return nil
}

// change changes the status if the order is still the present one.
func (s *Supervisor) change(d *duty, change func(*Status)) {
	s.mu.Lock()
	if s.current != d {
		s.mu.Unlock()
		return
	}
	state := s.status.State
	change(&s.status)
	if s.status.State != state {
		s.status.SinceMS = time.Now().UnixMilli()
	}
	if s.status.State == Drained || (s.status.State == Exited || s.status.State == Failed) && !d.draining {
		s.closeRings()
	}
	s.mu.Unlock()
	s.config.Changed()
}

// Answer is how a drain went.
type Answer struct {
	ExitCode *int   `json:"exit_code,omitempty"`
	Message  string `json:"message"`
}

// Drain runs the drain command, ends the daemon and returns how that went. It
// happens once; whoever asks later gets the same answer. It goes on when ctx ends.
func (s *Supervisor) Drain(ctx context.Context, timeoutMS int64) (Answer, error) {
	if timeoutMS < 1 || timeoutMS > maxDrainMS {
		return Answer{}, fault.BadRequest("timeout_ms", "timeout_ms must be between 1 and 86400000")
	}
	s.mu.Lock()
	d := s.current
	if d == nil {
		s.mu.Unlock()
		return Answer{}, nil
	}
	if !d.draining {
		d.draining = true
		d.retire()
		console.Go("drain", func() { d.drain(time.Duration(timeoutMS) * time.Millisecond) })
	}
	s.mu.Unlock()
	select {
	case <-d.drained:
		return d.answer, nil
	case <-ctx.Done():
		return Answer{}, ctx.Err()
	}
}

// Stop ends the daemon for good: what is left at killAt is killed, also where a
// drain or an older order had more time.
func (s *Supervisor) Stop(killAt time.Time) {
	s.mu.Lock()
	var duties []*duty
	for d := s.current; d != nil; d = d.before {
		duties = append(duties, d)
	}
	s.mu.Unlock()
	if len(duties) == 0 {
		return
	}
	for _, d := range duties {
		d.end(killAt)
		defer time.AfterFunc(time.Until(killAt), d.kill).Stop()
	}
	<-duties[0].over
}

// Leave hands the daemon over to who ends the whole machine, and returns at
// once: nothing is started any more, and what runs gets no signal from here.
func (s *Supervisor) Leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isLeft {
		return
	}
	s.isLeft = true
	close(s.left)
	for d := s.current; d != nil; d = d.before {
		d.retire()
	}
}
