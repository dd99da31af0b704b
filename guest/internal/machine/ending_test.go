package machine

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// virtual is a machine whose time passes only while somebody waits. It notes
// what is done to it, without repetitions.
type virtual struct {
	clock time.Time
	// Processes end so long after the first SIGTERM, or SIGKILL; -1: never.
	afterTerm, afterKill time.Duration
	// Looking for processes takes so long, as on a slow machine.
	looking time.Duration
	refused string // a disk that stays writable

	termed, killed time.Time
	done           []string
}

func newVirtual() *virtual { return &virtual{clock: time.Unix(1000, 0)} }

func (v *virtual) note(what string) {
	if len(v.done) == 0 || v.done[len(v.done)-1] != what {
		v.done = append(v.done, what)
	}
}

func (v *virtual) now() time.Time        { return v.clock }
func (v *virtual) pause(d time.Duration) { v.clock = v.clock.Add(d) }
func (v *virtual) sync()                 { v.note("sync") }
func (v *virtual) restart()              { v.note("restart") }

func (v *virtual) signal(sig syscall.Signal) {
	switch {
	case sig == syscall.SIGTERM && v.termed.IsZero():
		v.termed = v.clock
	case sig == syscall.SIGKILL && v.killed.IsZero():
		v.killed = v.clock
	}
	v.note(sig.String())
}

func (v *virtual) anyProcess() bool {
	v.clock = v.clock.Add(v.looking)
	over := func(since time.Time, takes time.Duration) bool {
		return !since.IsZero() && takes >= 0 && !v.clock.Before(since.Add(takes))
	}
	return !over(v.termed, v.afterTerm) && !over(v.killed, v.afterKill)
}

func (v *virtual) makeReadOnly(disk string) error {
	v.note("read-only " + disk)
	if disk == v.refused {
		return errors.New("busy")
	}
	return nil
}

// term, cont and kill are the names that Go has for the signals.
var term, cont, kill = syscall.SIGTERM.String(), syscall.SIGCONT.String(), syscall.SIGKILL.String()

func TestTheOrderOfAnEnd(t *testing.T) {
	end := []string{"sync", "read-only /", "read-only /disk", "restart"}
	for _, c := range []struct {
		name                 string
		afterTerm, afterKill time.Duration
		refused              string
		signals              []string
		took                 time.Duration
	}{
		{"nothing runs", 0, 0, "", []string{term, cont}, 0},
		{"all obey", 300 * time.Millisecond, 0, "", []string{term, cont}, 300 * time.Millisecond},
		{"the last moment", TermGrace, 0, "", []string{term, cont}, TermGrace},
		{"one ignores SIGTERM", -1, 20 * time.Millisecond, "", []string{term, cont, kill}, TermGrace + 20*time.Millisecond},
		{"one cannot be killed", -1, -1, "", []string{term, cont, kill}, TermGrace + killGrace},
		{"a disk is busy", 0, 0, "/", []string{term, cont}, 0},
	} {
		v := newVirtual()
		v.afterTerm, v.afterKill, v.refused = c.afterTerm, c.afterKill, c.refused
		begun := v.clock
		shutDown(v, []string{"/disk"})
		if want := slices.Concat(c.signals, end); !slices.Equal(v.done, want) {
			t.Errorf("%s: %s; not %s", c.name, strings.Join(v.done, ", "), strings.Join(want, ", "))
		}
		if took := v.clock.Sub(begun); took != c.took {
			t.Errorf("%s: took %v, not %v", c.name, took, c.took)
		}
	}
}

// On a slow machine looking takes time; that is no reason to wait for longer.
func TestTheDeadlineIsOneForAllThatIsWaitedFor(t *testing.T) {
	v := newVirtual()
	v.afterTerm, v.afterKill, v.looking = -1, -1, 150*time.Millisecond
	begun := v.clock
	shutDown(v, nil)
	most := TermGrace + killGrace + 2*(v.looking+pollEvery) // what was begun in time is done
	if took := v.clock.Sub(begun); took > most {
		t.Errorf("took %v, more than %v", took, most)
	}
	if v.done[len(v.done)-1] != "restart" || !slices.Contains(v.done, kill) {
		t.Errorf("%v", v.done)
	}
}
