package process

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strconv"
	"testing"
	"time"

	"fused/internal/account"
	"fused/internal/reap"
)

func TestTheRingKeepsTheLastBytesUnderTheirOffsets(t *testing.T) {
	r := NewRing()
	var all []byte
	for i := range 40000 {
		line := []byte(strconv.Itoa(i) + "\n")
		all = append(all, line...)
		r.Write(line)
		if start, end := r.Range(); end != int64(len(all)) || start != max(0, end-int64(r.Held())) {
			t.Fatalf("range %d..%d at %d", start, end, len(all))
		}
	}
	big := bytes.Repeat([]byte("0123456789"), 130000) // more than the ring at once
	all = append(all, big...)
	r.Write(big)
	start, end := r.Range()
	if end != int64(len(all)) || end-start != RingSize {
		t.Fatalf("range %d..%d", start, end)
	}
	got := make([]byte, RingSize)
	n, err := r.ReadAt(context.Background(), got, start)
	if n != RingSize || err != nil || !bytes.Equal(got, all[start:]) {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if _, err := r.ReadAt(context.Background(), got, start-1); err != ErrLost {
		t.Fatalf("lost bytes: %v", err)
	}
	if n, _ := r.ReadAt(context.Background(), got, end-3); n != 3 {
		t.Fatalf("%d bytes at the end", n)
	}
}

func TestASmallRingIsSmall(t *testing.T) {
	r := NewRing()
	if r.Held() != 0 {
		t.Fatal("an empty ring takes memory")
	}
	r.Write([]byte("x"))
	if r.Held() != firstRing {
		t.Fatalf("%d bytes", r.Held())
	}
}

func TestARingsReaderWaits(t *testing.T) {
	r := NewRing()
	got := make(chan string, 1)
	go func() {
		buf := make([]byte, 10)
		n, _ := r.ReadAt(context.Background(), buf, 0)
		got <- string(buf[:n])
	}()
	time.Sleep(5 * time.Millisecond)
	r.Write([]byte("new"))
	if text := <-got; text != "new" {
		t.Fatalf("got %q", text)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.ReadAt(ctx, make([]byte, 1), 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("after giving up: %v", err)
	}
	r.Close()
	if _, err := r.ReadAt(context.Background(), make([]byte, 1), 3); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
}

func newTable(t *testing.T) *Table {
	reaper := reap.New(false, nil)
	t.Cleanup(reaper.Stop)
	return NewTable(&Launcher{Reaper: reaper})
}

func startBackground(t *testing.T, table *Table, request Request) *Background {
	t.Helper()
	spec, err := request.Resolve(Defaults{}, account.System)
	if err != nil {
		t.Fatal(err)
	}
	b, err := table.Start(spec, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Kill(); <-b.Finished() })
	return b
}

func awaitEOF(t *testing.T, r *Ring) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		_, end := r.Range()
		_, err := r.ReadAt(ctx, make([]byte, 4096), end)
		if err == io.EOF {
			return
		}
		if err != nil && err != ErrLost {
			t.Fatal(err)
		}
	}
}

func TestABackgroundProcessIsRemembered(t *testing.T) {
	table := newTable(t)
	b := startBackground(t, table, sh("printf out; printf error >&2; exit 4"))
	awaitEOF(t, b.Ring("stdout"))
	awaitEOF(t, b.Ring("stderr"))
	found, err := table.Get(strconv.Itoa(b.PID))
	if err != nil || found != b {
		t.Fatal(err)
	}
	d := b.Describe()
	if d.State != "exited" || d.Exit == nil || d.Exit.ExitCode != 4 || d.Output["stdout"] != (Range{0, 3}) || d.Output["stderr"] != (Range{0, 5}) {
		t.Fatalf("%+v", d)
	}
	if b.Ring("stdin") != nil {
		t.Fatal("there is no such stream")
	}
	for _, pid := range []string{"0", "x", ""} {
		_, err := table.Get(pid)
		wantReason(t, err, "process_not_found")
	}
}

func TestOnlyTheLatestEndedProcessesAreRemembered(t *testing.T) {
	table := newTable(t)
	alive := startBackground(t, table, sh("sleep 300"))
	first := startBackground(t, table, sh("exit 0"))
	awaitEOF(t, first.Ring("stdout"))
	for range MaxEnded {
		awaitEOF(t, startBackground(t, table, Request{Cmd: []string{"/bin/true"}}).Ring("stdout"))
	}
	list := table.List()
	if len(list) != MaxEnded+1 || list[0].PID != alive.PID {
		t.Fatalf("%d processes, the first is %d", len(list), list[0].PID)
	}
	for _, d := range list {
		if d.PID == first.PID && d.StartedAtUnixMS == first.startedAt.UnixMilli() {
			t.Fatal("the oldest was not dropped")
		}
	}
}

func TestTheOutputOfEndedProcessesIsBounded(t *testing.T) {
	table := newTable(t)
	var all []*Background
	for range maxEndedOutput/RingSize + 2 {
		b := startBackground(t, table, sh("head -c 1100000 /dev/zero"))
		awaitEOF(t, b.Ring("stdout"))
		all = append(all, b)
	}
	held := 0
	for _, b := range all {
		held += b.Ring("stdout").Held()
	}
	if held > maxEndedOutput {
		t.Fatalf("%d bytes are held", held)
	}
	if start, end := all[0].Ring("stdout").Range(); start != 1100000 || end != 1100000 {
		t.Fatalf("the oldest has %d..%d", start, end)
	}
	if start, end := all[len(all)-1].Ring("stdout").Range(); end-start != RingSize {
		t.Fatalf("the latest has %d..%d", start, end)
	}
}
