package process

import (
	"slices"
	"strconv"
	"sync"
	"time"

	"fused/internal/console"
	"fused/internal/fault"
)

const (
	// MaxEnded is how many ended background processes are remembered.
	MaxEnded = 256
	// maxEndedOutput bounds the memory that their output takes together; the
	// oldest lose theirs first, and readers are told so as with any lost bytes.
	maxEndedOutput = 32 << 20
)

// Background is a process that belongs to no conversation.
type Background struct {
	*Command
	argv      []string
	startedAt time.Time
	rings     [2]*Ring
}

// Description is the "process" of the protocol.
type Description struct {
	PID             int              `json:"pid"`
	Cmd             []string         `json:"cmd"`
	State           string           `json:"state"`
	StartedAtUnixMS int64            `json:"started_at_unix_ms"`
	Exit            *Exit            `json:"exit,omitempty"`
	Output          map[string]Range `json:"output"`
}

// Range is what a stream retains.
type Range struct {
	Start int64 `json:"start"`
	End   int64 `json:"end"`
}

// Table knows the background processes, running and ended.
type Table struct {
	launcher *Launcher

	mu    sync.Mutex
	byPID map[int]*Background
	ended []*Background // oldest first
}

// NewTable returns an empty table.
func NewTable(l *Launcher) *Table { return &Table{launcher: l, byPID: map[int]*Background{}} }

// Start starts a background process.
func (t *Table) Start(spec Spec, opts Options) (*Background, error) {
	b := &Background{argv: spec.Argv, startedAt: time.Now(), rings: [2]*Ring{NewRing(), NewRing()}}
	opts.Stdout, opts.Stderr = b.rings[0].Write, b.rings[1].Write
	command, err := t.launcher.Start(spec, opts)
	if err != nil {
		return nil, err
	}
	b.Command = command
	t.mu.Lock()
	// The kernel may give the number of an ended process again.
	if old := t.byPID[b.PID]; old != nil {
		t.ended = slices.DeleteFunc(t.ended, func(o *Background) bool { return o == old })
	}
	t.byPID[b.PID] = b
	t.mu.Unlock()
	console.Go("background", func() { t.watch(b) })
	return b, nil
}

func (t *Table) watch(b *Background) {
	<-b.Finished()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ring := range b.rings {
		ring.Close()
	}
	if t.byPID[b.PID] != b {
		return
	}
	t.ended = append(t.ended, b)
	if len(t.ended) > MaxEnded {
		delete(t.byPID, t.ended[0].PID)
		t.ended = slices.Delete(t.ended, 0, 1)
	}
	t.boundOutput()
}

func (t *Table) boundOutput() {
	held := 0
	for _, b := range slices.Backward(t.ended) {
		for _, ring := range b.rings {
			if held += ring.Held(); held > maxEndedOutput {
				ring.Discard()
			}
		}
	}
}

// Get finds a process by the number in a route.
func (t *Table) Get(pid string) (*Background, error) {
	number, err := strconv.Atoi(pid)
	t.mu.Lock()
	defer t.mu.Unlock()
	if b := t.byPID[number]; b != nil && err == nil {
		return b, nil
	}
	return nil, ProcessNotFound(pid)
}

// ProcessNotFound is the answer for a process that is unknown or has ended.
func ProcessNotFound(pid string) error {
	return fault.New("process_not_found", "no background process has the number "+pid+" (any more)", "pid", pid)
}

// List returns all processes, oldest first.
func (t *Table) List() []Description {
	t.mu.Lock()
	all := make([]*Background, 0, len(t.byPID))
	for _, b := range t.byPID {
		all = append(all, b)
	}
	t.mu.Unlock()
	slices.SortFunc(all, func(a, b *Background) int { return a.startedAt.Compare(b.startedAt) })
	list := make([]Description, 0, len(all))
	for _, b := range all {
		list = append(list, b.Describe())
	}
	return list
}

// Describe returns the process's state of this moment.
func (b *Background) Describe() Description {
	d := Description{
		PID: b.PID, Cmd: b.argv, State: "running", StartedAtUnixMS: b.startedAt.UnixMilli(),
		Output: map[string]Range{},
	}
	select {
	case <-b.Finished():
		exit := b.Exit()
		d.State, d.Exit = "exited", &exit
	default:
	}
	for i, name := range []string{"stdout", "stderr"} {
		start, end := b.rings[i].Range()
		d.Output[name] = Range{start, end}
	}
	return d
}

// Ring returns a stream's retained output; nil for an unknown name.
func (b *Background) Ring(stream string) *Ring {
	switch stream {
	case "stdout":
		return b.rings[0]
	case "stderr":
		return b.rings[1]
	}
	return nil
}
