package process

import (
	"maps"
	"slices"
	"strconv"
	"strings"
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
	// maxEndedKeyed is how many ended processes with a key are remembered, with
	// all their output.
	maxEndedKeyed = 16
)

// Background is a process that belongs to no conversation.
type Background struct {
	*Command
	key       string
	argv      []string
	startedAt time.Time
	rings     [2]*Ring
}

// Description is the "process" of the protocol.
type Description struct {
	PID             int              `json:"pid"`
	Key             string           `json:"key,omitempty"`
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

	starting sync.Mutex // held while a process with a key is looked up and started

	mu         sync.Mutex
	byPID      map[int]*Background
	byKey      map[string]*Background
	ended      []*Background // without a key, oldest first
	endedKeyed []*Background // oldest first
}

// NewTable returns an empty table.
func NewTable(l *Launcher) *Table {
	return &Table{launcher: l, byPID: map[int]*Background{}, byKey: map[string]*Background{}}
}

// Start starts a background process.
func (t *Table) Start(spec Spec, opts Options) (*Background, error) { return t.start("", spec, opts) }

// StartOnce returns the process that was started under the key; where there is
// none it starts what prepare returns.
func (t *Table) StartOnce(key string, prepare func() (Spec, Options, error)) (b *Background, isNew bool, err error) {
	if err := CheckKey(key); err != nil {
		return nil, false, err
	}
	t.starting.Lock()
	defer t.starting.Unlock()
	if b, err := t.Get(keyPrefix + key); err == nil {
		return b, false, nil
	}
	spec, opts, err := prepare()
	if err == nil {
		b, err = t.start(key, spec, opts)
	}
	return b, true, err
}

func (t *Table) start(key string, spec Spec, opts Options) (*Background, error) {
	b := &Background{key: key, argv: spec.Argv, startedAt: time.Now(), rings: [2]*Ring{NewRing(), NewRing()}}
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
	if key != "" {
		t.byKey[key] = b
	}
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
	if b.key != "" {
		t.rememberKeyed(b)
		return
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

func (t *Table) rememberKeyed(b *Background) {
	t.endedKeyed = append(t.endedKeyed, b)
	if len(t.endedKeyed) <= maxEndedKeyed {
		return
	}
	oldest := t.endedKeyed[0]
	t.endedKeyed = slices.Delete(t.endedKeyed, 0, 1)
	delete(t.byKey, oldest.key)
	if t.byPID[oldest.PID] == oldest {
		delete(t.byPID, oldest.PID)
	}
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

// keyPrefix tells a key from a number in a route.
const keyPrefix = "@"

// CheckKey says whether a text may be the key of a process.
func CheckKey(key string) error {
	allowed := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)
	}
	if key == "" || len(key) > 64 || strings.ContainsFunc(key, func(r rune) bool { return !allowed(r) }) {
		return fault.BadRequest("key", "key must be 1 to 64 letters, digits, dots, underscores and dashes")
	}
	return nil
}

// Get finds a process by what a route says: its number, or @ and its key.
func (t *Table) Get(name string) (*Background, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if key, isKey := strings.CutPrefix(name, keyPrefix); isKey {
		if b := t.byKey[key]; b != nil {
			return b, nil
		}
		return nil, ProcessNotFound(name)
	}
	number, err := strconv.Atoi(name)
	if b := t.byPID[number]; b != nil && err == nil {
		return b, nil
	}
	return nil, ProcessNotFound(name)
}

// ProcessNotFound is the answer for a process that is unknown or has ended.
func ProcessNotFound(pid string) error {
	return fault.New("process_not_found", "no background process has the number "+pid+" (any more)", "pid", pid)
}

// List returns all processes, oldest first.
func (t *Table) List() []Description {
	t.mu.Lock()
	all := slices.Collect(maps.Values(t.byPID))
	for _, b := range t.byKey {
		if t.byPID[b.PID] != b { // its number belongs to somebody else by now
			all = append(all, b)
		}
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
		PID: b.PID, Key: b.key, Cmd: b.argv, State: "running", StartedAtUnixMS: b.startedAt.UnixMilli(),
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
