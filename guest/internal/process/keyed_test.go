package process

import (
	"fmt"
	"testing"

	"fused/internal/account"
)

func startOnce(t *testing.T, table *Table, key, script string) *Background {
	t.Helper()
	request := sh(script)
	b, _, err := table.StartOnce(key, func() (Spec, Options, error) {
		spec, err := request.Resolve(Defaults{}, account.System)
		return spec, Options{}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	awaitEOF(t, b.Ring("stdout")) // the table has noticed the end
	return b
}

func TestKeyedOutputOutlivesThatOfOthers(t *testing.T) {
	table := newTable(t)
	keyed := startOnce(t, table, "startup", "head -c 1000000 /dev/zero; echo end")
	// More than is kept of processes without a key.
	for range maxEndedOutput/(1<<20) + 8 {
		awaitEOF(t, startBackground(t, table, sh("head -c 1100000 /dev/zero")).Ring("stdout"))
	}
	if start, end := keyed.Ring("stdout").Range(); start != 0 || end != 1000004 {
		t.Errorf("%d to %d", start, end)
	}
	if b, err := table.Get("@startup"); b != keyed || err != nil {
		t.Errorf("%v %v", b, err)
	}
}

func TestTheOldestKeysAreForgotten(t *testing.T) {
	table := newTable(t)
	for i := range maxEndedKeyed + 2 {
		startOnce(t, table, fmt.Sprint(i), "true")
	}
	for i := range maxEndedKeyed + 2 {
		if _, err := table.Get("@" + fmt.Sprint(i)); (err == nil) != (i >= 2) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if n := len(table.List()); n != maxEndedKeyed {
		t.Errorf("%d are listed", n)
	}
}

func TestAKeyFindsItsProcessWhenItsNumberIsAnothers(t *testing.T) {
	table := newTable(t)
	keyed := startOnce(t, table, "k", "true")
	other := startOnce(t, table, "other", "true")
	table.mu.Lock()
	table.byPID[keyed.PID] = other // as if the kernel had given the number again
	table.mu.Unlock()
	if b, _ := table.Get("@k"); b != keyed {
		t.Error("the key finds another process")
	}
	listed := 0
	for _, d := range table.List() {
		if d.Key == "k" {
			listed++
		}
	}
	if listed != 1 {
		t.Errorf("listed %d times", listed)
	}
}
