package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"fused/internal/account"
	"fused/internal/board"
	"fused/internal/cgroup"
	"fused/internal/download"
	"fused/internal/fault"
	"fused/internal/process"
	"fused/internal/reap"
)

const patience = 30 * time.Second

var quick = Pace{First: 5 * time.Millisecond, Longest: 20 * time.Millisecond, Settled: time.Hour}

// world is a supervisor and a folder in which daemons leave traces.
type world struct {
	*Supervisor
	t      *testing.T
	board  *board.Board
	folder string
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, board: board.New(), folder: t.TempDir()}
	reaper := reap.New(false, nil)
	launcher := &process.Launcher{Reaper: reaper, Cgroups: testTree(t)}
	w.Supervisor = New(Config{
		Launcher: launcher, Folder: w.folder, Limits: download.Limits{Bytes: 1 << 20, Total: patience, Idle: patience}, Pace: quick,
		Resolve: func(r process.Request) (process.Spec, error) { return r.Resolve(process.Defaults{}, account.System) },
		Changed: w.board.Changed,
	})
	t.Cleanup(func() {
		w.Stop(time.Now())
		awaitNone(t)
		reaper.Stop()
	})
	return w
}

// testTree is a cgroup of the test's own where the machine lets it make one.
func testTree(t *testing.T) *cgroup.Tree {
	tree, err := cgroup.Open(fmt.Sprintf("/sys/fs/cgroup/fused-daemon-%d", os.Getpid()))
	if err != nil {
		return nil
	}
	t.Cleanup(func() {
		tree.Sweep()
		os.Remove(fmt.Sprintf("/sys/fs/cgroup/fused-daemon-%d", os.Getpid()))
	})
	return tree
}

// awaitNone fails when a goroutine of the supervisor goes on.
func awaitNone(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		stacks := string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "daemon.(*duty)") && !strings.Contains(stacks, "process.(*Command)") {
			return
		}
	}
	t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
}

func (w *world) put(order Order) {
	w.t.Helper()
	if order.ID == "" {
		order.ID = "1"
	}
	if err := w.Put(order); err != nil {
		w.t.Fatal(err)
	}
}

// await waits until the status is what is wanted, by the board alone.
func (w *world) await(what string, holds func(Status) bool) Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		version := w.board.Version()
		_, status := w.Status()
		if status != nil && holds(*status) {
			return *status
		}
		if ctx.Err() != nil {
			w.t.Fatalf("never %s: %+v", what, status)
		}
		w.board.Wait(ctx, version)
	}
}

func (w *world) awaitState(state string) Status {
	w.t.Helper()
	return w.await(state, func(s Status) bool { return s.State == state })
}

func (w *world) output(stream string) string {
	start, end := w.Ring(stream).Range()
	if start == end {
		return ""
	}
	buf := make([]byte, end-start)
	n, _ := w.Ring(stream).ReadAt(context.Background(), buf, start)
	return string(buf[:n])
}

func (w *world) awaitOutput(text string) {
	w.t.Helper()
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		if strings.Contains(w.output("stdout"), text) {
			return
		}
	}
	w.t.Fatalf("no %q in %q", text, w.output("stdout"))
}

func (w *world) drain(ms int64) Answer {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := w.Drain(ctx, ms)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer
}

func sh(text string) []string { return []string{"/bin/sh", "-c", text} }

func reasonOf(err error) string { return fault.Of(err).Reason }

func TestNothingIsKnownBeforeAnOrder(t *testing.T) {
	w := newWorld(t)
	if id, status := w.Status(); id != "" || status != nil {
		t.Errorf("%q %v", id, status)
	}
	if answer := w.drain(1000); answer.ExitCode != nil || answer.Message != "" {
		t.Errorf("%+v", answer)
	}
	if _, err := w.Ring("stdout").ReadAt(context.Background(), make([]byte, 1), 0); err != io.EOF {
		t.Errorf("a follower would wait: %v", err)
	}
}

func TestBadOrdersAreRefused(t *testing.T) {
	w := newWorld(t)
	for name, order := range map[string]Order{
		"no id":          {Command: sh("true")},
		"no command":     {ID: "1"},
		"an empty word":  {ID: "1", Command: []string{""}},
		"a NUL":          {ID: "1", Command: []string{"a\x00"}},
		"a bad drain":    {ID: "1", Command: sh("true"), DrainCommand: []string{""}},
		"a bad variable": {ID: "1", Command: sh("true"), Env: map[string]string{"": ""}},
		"a bad policy":   {ID: "1", Command: sh("true"), Restart: "sometimes"},
		"a bad url":      {ID: "1", DownloadURL: "ftp://x/y"},
		"a short digest": {ID: "1", DownloadURL: "http://x/y", SHA256: "abcd"},
		"no digest":      {ID: "1", DownloadURL: "http://x/y", SHA256: strings.Repeat("x", 64)},
	} {
		if err := w.Put(order); reasonOf(err) != "bad_request" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, status := w.Status(); status != nil {
		t.Errorf("%+v", status)
	}
	bare := New(Config{Changed: func() {}})
	if err := bare.Put(Order{ID: "1", DownloadURL: "http://x/y"}); reasonOf(err) != "not_supported" {
		t.Error(err)
	}
	for _, ms := range []int64{0, -1, maxDrainMS + 1} {
		if _, err := w.Drain(context.Background(), ms); reasonOf(err) != "bad_request" {
			t.Errorf("%d: %v", ms, err)
		}
	}
}

func TestRestartPolicies(t *testing.T) {
	for _, c := range []struct {
		policy string
		code   int
		again  bool
	}{
		{Always, 0, true}, {"", 3, true}, {OnFailure, 3, true}, {OnFailure, 0, false}, {Never, 3, false},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			w := newWorld(t)
			w.put(Order{Command: sh(fmt.Sprintf("echo life; exit %d", c.code)), Restart: c.policy})
			if c.again {
				status := w.await("started again", func(s Status) bool { return s.Restarts >= 3 && s.ExitCode != nil })
				if *status.ExitCode != c.code || status.Message == "" {
					t.Errorf("%+v: %+v", c, status)
				}
				return
			}
			status := w.awaitState(Exited)
			if status.Restarts != 0 || *status.ExitCode != c.code || status.Message != fmt.Sprintf("it ended with exit code %d", c.code) || status.SinceMS == 0 {
				t.Errorf("%+v: %+v", c, status)
			}
			if out := w.output("stdout"); out != "life\n" {
				t.Errorf("%+v: %q", c, out)
			}
			// Followers are at the end.
			if _, err := w.Ring("stdout").ReadAt(context.Background(), make([]byte, 1), 5); err != io.EOF {
				t.Error(err)
			}
		})
	}
}

func TestPausesGrowAndBeginAnewAfterALongLife(t *testing.T) {
	p := UsualPace
	pause, seen := time.Duration(0), []time.Duration{}
	for range 7 {
		pause = p.after(pause, time.Second)
		seen = append(seen, pause/time.Second)
	}
	if fmt.Sprintf("%d", seen) != "[1 2 4 8 16 30 30]" {
		t.Errorf("%d", seen)
	}
	if p.after(pause, 10*time.Second) != time.Second {
		t.Error("a long life does not count")
	}
}

func TestADaemonThatIsKilledIsStartedAgain(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh("echo pid $$; sleep 1000")})
	w.awaitOutput("pid ")
	var pid int
	fmt.Sscanf(w.output("stdout"), "pid %d", &pid)
	syscall.Kill(pid, syscall.SIGKILL)
	status := w.await("running again", func(s Status) bool { return s.State == Running && s.Restarts == 1 })
	if *status.ExitCode != 137 || status.Message != "it was ended by the signal KILL" {
		t.Errorf("%+v", status)
	}
}

func TestTheSameIdChangesNothing(t *testing.T) {
	w := newWorld(t)
	w.put(Order{ID: "a", Command: sh("echo life; exit 0"), Restart: Never})
	w.awaitState(Exited)
	version := w.board.Version()
	w.put(Order{ID: "a", Command: sh("echo other")})
	if id, status := w.Status(); id != "a" || status.State != Exited || w.board.Version() != version {
		t.Errorf("%q %+v", id, status)
	}
}

func TestAnotherIdEndsTheOldDaemonFirst(t *testing.T) {
	w := newWorld(t)
	// A lock shows that never two of them run.
	hold := `mkdir ` + w.folder + `/lock || exit 99; trap 'echo bye; rmdir ` + w.folder + `/lock; exit 0' TERM; echo up; while :; do sleep 0.01; done`
	for _, id := range []string{"a", "b", "c"} {
		w.put(Order{ID: id, Command: sh("echo " + id + "; " + hold), Restart: Never})
		w.await("running", func(s Status) bool { return s.State == Running })
		w.awaitOutput(id + "\nup\n")
	}
	if id, status := w.Status(); id != "c" || status.State != Running || status.ExitCode != nil {
		t.Errorf("%q %+v", id, status)
	}
	if out := w.output("stdout"); out != "a\nup\nbye\nb\nup\nbye\nc\nup\n" {
		t.Errorf("%q", out)
	}
}

func TestManyOrdersAtOnceLeaveTheLast(t *testing.T) {
	w := newWorld(t)
	for i := range 20 {
		w.put(Order{ID: fmt.Sprint(i), Command: sh("sleep 1000")})
	}
	w.await("the last running", func(s Status) bool { return s.State == Running })
	if id, _ := w.Status(); id != "19" {
		t.Errorf("%q", id)
	}
}

func TestWhatADaemonLeavesBehindEndsWithIt(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh("sleep 1000 & echo child $!; exit 0"), Restart: Never})
	w.awaitState(Exited)
	var pid int
	fmt.Sscanf(w.output("stdout"), "child %d", &pid)
	for until := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		// A zombie nobody waits for is as good as gone.
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(text), ") Z ") {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("%d still runs", pid)
		}
	}
}

func TestAProgramThatCannotBeStartedFails(t *testing.T) {
	w := newWorld(t)
	os.WriteFile(w.folder+"/text", []byte("no program"), 0o700)
	for i, command := range [][]string{{"no-such-program"}, {w.folder + "/text"}, {"/etc/passwd"}} {
		w.put(Order{ID: fmt.Sprint(i), Command: command})
		status := w.await("failed", func(s Status) bool { return s.State == Failed })
		if status.Restarts != 0 || !strings.Contains(status.Message, command[0]) {
			t.Errorf("%v: %+v", command, status)
		}
	}
}

func TestTheDaemonFindsItsCredentials(t *testing.T) {
	w := newWorld(t)
	for name, text := range map[string]string{
		"auth-token": "t0ken\n", "gateway.json": `{"url": "https://g/", "token": "gt"}`, "secrets.json": "{}", "manifest.json": "{}",
	} {
		os.WriteFile(filepath.Join(w.folder, name), []byte(text), 0o600)
	}
	w.put(Order{Command: []string{"/usr/bin/env"}, Env: map[string]string{"MINE": "1", "FUSE_GATEWAY_URL": "other"}, Restart: Never})
	w.awaitState(Exited)
	out := "\n" + w.output("stdout")
	for _, line := range []string{
		"FUSE_AUTH_TOKEN=t0ken", "FUSE_AUTH_TOKEN_FILE=" + w.folder + "/auth-token", "FUSE_GATEWAY_URL=other", "FUSE_GATEWAY_TOKEN=gt",
		"FUSE_SECRETS_FILE=" + w.folder + "/secrets.json", "FUSE_MANIFEST_FILE=" + w.folder + "/manifest.json", "MINE=1", "USER=root",
	} {
		if !strings.Contains(out, "\n"+line+"\n") {
			t.Errorf("no %s in %s", line, out)
		}
	}
	if env := credentials(t.TempDir()); len(env) != 0 {
		t.Errorf("%v", env)
	}
}

func TestADownloadedDaemonIsStarted(t *testing.T) {
	program := "#!/bin/sh\necho downloaded $0; exec sleep 1000\n"
	digest := sha256.Sum256([]byte(program))
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/daemon" {
			w.WriteHeader(404)
		}
		io.WriteString(w, program)
	}))
	defer site.Close()
	w := newWorld(t)
	w.put(Order{ID: "1", DownloadURL: site.URL + "/daemon", SHA256: strings.ToUpper(hex.EncodeToString(digest[:]))})
	w.awaitState(Running)
	w.awaitOutput("downloaded " + w.folder + "/agent")
	w.put(Order{ID: "2", DownloadURL: site.URL + "/missing"})
	status := w.awaitState(Failed)
	if !strings.Contains(status.Message, "404") {
		t.Errorf("%+v", status)
	}
	w.put(Order{ID: "3", DownloadURL: site.URL + "/daemon", SHA256: strings.Repeat("0", 64)})
	if status = w.awaitState(Failed); !strings.Contains(status.Message, "sha256") {
		t.Errorf("%+v", status)
	}
}

func TestADownloadEndsWithItsOrder(t *testing.T) {
	arrived := make(chan struct{})
	site := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { close(arrived); <-r.Context().Done() }))
	defer site.Close()
	w := newWorld(t)
	w.put(Order{ID: "1", DownloadURL: site.URL})
	<-arrived
	if answer := w.drain(20000); answer.ExitCode != nil || answer.Message != "" {
		t.Errorf("%+v", answer)
	}
	w.put(Order{ID: "2", Command: sh("sleep 1000")})
	w.awaitState(Running)
}

func TestDrain(t *testing.T) {
	w := newWorld(t)
	w.put(Order{
		Command: sh(`trap 'echo term; exit 7' TERM; echo up; while :; do sleep 0.01; done`),
		Env:     map[string]string{"MINE": "1"}, DrainCommand: sh("echo drain $MINE; exit 0"),
	})
	w.awaitOutput("up")
	answer := w.drain(20000)
	if answer.Message != "" || *answer.ExitCode != 7 {
		t.Errorf("%+v", answer)
	}
	if out := w.output("stdout"); out != "up\ndrain 1\nterm\n" {
		t.Errorf("%q", out)
	}
	_, status := w.Status()
	if status.State != Drained || *status.ExitCode != 7 || status.Restarts != 0 {
		t.Errorf("%+v", status)
	}
	if again := w.drain(1); *again.ExitCode != 7 || again.Message != "" {
		t.Errorf("%+v", again)
	}
	// The same order stays drained; another one lives.
	w.put(Order{Command: sh("true")})
	if _, status := w.Status(); status.State != Drained {
		t.Errorf("%+v", status)
	}
	w.put(Order{ID: "2", Command: sh("sleep 1000")})
	w.awaitState(Running)
}

func TestADrainIsOneForAllWhoAsk(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh("sleep 1000"), DrainCommand: sh("echo once; sleep 0.1")})
	w.awaitState(Running)
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := w.Drain(gone, 20000); err != context.Canceled {
		t.Error(err)
	}
	answers := make(chan Answer)
	for range 4 {
		go func() {
			answer, _ := w.Drain(context.Background(), 20000)
			answers <- answer
		}()
	}
	for range 4 {
		if answer := <-answers; answer.ExitCode == nil || *answer.ExitCode != 143 || answer.Message != "" {
			t.Errorf("%+v", answer)
		}
	}
	if out := w.output("stdout"); out != "once\n" {
		t.Errorf("%q", out)
	}
}

func TestWhatGoesWrongInADrainIsSaid(t *testing.T) {
	stubborn := sh(`trap '' TERM; echo up; while :; do sleep 0.01; done`)
	for _, c := range []struct {
		daemon, drain []string
		timeout       int64
		code          int // 0: how the daemon ends within the rest of the time is not the question
		words         []string
	}{
		{sh("echo up; exec sleep 1000"), sh("echo why >&2; exit 3"), 20000, 143, []string{"exit code 3: why"}},
		{sh("echo up; exec sleep 1000"), []string{"no-such"}, 20000, 143, []string{"was not started", "no-such"}},
		{sh("echo up; exec sleep 1000"), sh("kill -9 $$"), 20000, 143, []string{"signal KILL"}},
		{sh("echo up; exec sleep 1000"), sh("sleep 1000"), 400, 0, []string{"not done after 300ms"}},
		{stubborn, nil, 200, 137, []string{"was killed"}},
		{stubborn, sh("sleep 1000"), 400, 137, []string{"not done after 300ms", "; the daemon did not end in time"}},
	} {
		t.Run(fmt.Sprint(c.drain, c.words), func(t *testing.T) {
			w := newWorld(t)
			w.put(Order{Command: c.daemon, DrainCommand: c.drain})
			w.awaitOutput("up")
			answer := w.drain(c.timeout)
			for _, words := range c.words {
				if !strings.Contains(answer.Message, words) {
					t.Errorf("%v %v: %+v", c.daemon, c.drain, answer)
				}
			}
			if _, status := w.Status(); c.code != 0 && *answer.ExitCode != c.code || status.State != Drained || status.Message != answer.Message {
				t.Errorf("%v %v: %d %+v", c.daemon, c.drain, *answer.ExitCode, status)
			}
		})
	}
}

func TestADrainWithinAPauseStartsNothing(t *testing.T) {
	w := newWorld(t)
	w.config.Pace = Pace{First: time.Hour, Longest: time.Hour, Settled: time.Hour}
	w.put(Order{Command: sh("exit 4")})
	w.await("in its pause", func(s Status) bool {
		return s.State == Starting && strings.Contains(s.Message, "started again after 1h")
	})
	if answer := w.drain(20000); *answer.ExitCode != 4 || answer.Message != "" {
		t.Errorf("%+v", answer)
	}
}

func TestADaemonThatItsDrainCommandEndsIsNotStartedAgain(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh("echo $$ > " + w.folder + "/pid; echo up; exec sleep 1000"), DrainCommand: sh("kill $(cat " + w.folder + "/pid); sleep 0.1")})
	w.awaitOutput("up")
	if answer := w.drain(20000); *answer.ExitCode != 143 || answer.Message != "" {
		t.Errorf("%+v", answer)
	}
	if _, status := w.Status(); status.Restarts != 0 || status.State != Drained {
		t.Errorf("%+v", status)
	}
}

func TestAnOrderWaitsForTheDrainOfTheOneBefore(t *testing.T) {
	w := newWorld(t)
	w.put(Order{ID: "a", Command: sh("echo up; exec sleep 1000"), DrainCommand: sh("echo draining; sleep 0.1; echo drained")})
	w.awaitOutput("up")
	answers := make(chan Answer)
	go func() {
		answer, _ := w.Drain(context.Background(), 20000)
		answers <- answer
	}()
	w.awaitOutput("draining")
	w.put(Order{ID: "b", Command: sh("echo next; exec sleep 1000")})
	if answer := <-answers; *answer.ExitCode != 143 || answer.Message != "" {
		t.Errorf("%+v", answer)
	}
	w.awaitOutput("next")
	if out := w.output("stdout"); out != "up\ndraining\ndrained\nnext\n" {
		t.Errorf("%q", out)
	}
	if _, status := w.Status(); status.State != Running && status.State != Starting {
		t.Errorf("%+v", status)
	}
}

func TestStopAlsoEndsADrain(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh("echo up; exec sleep 1000"), DrainCommand: sh("echo draining; sleep 1000")})
	w.awaitOutput("up")
	go w.Drain(context.Background(), maxDrainMS)
	w.awaitOutput("draining")
	w.Stop(time.Now().Add(time.Second))
	w.awaitState(Drained)
}

func TestStopDoesNotWaitForALongDrain(t *testing.T) {
	w := newWorld(t)
	w.put(Order{ID: "a", Command: sh(`trap 'echo term' TERM; echo up; while :; do sleep 0.01; done`)})
	w.awaitOutput("up")
	answers := make(chan Answer)
	go func() {
		answer, _ := w.Drain(context.Background(), maxDrainMS)
		answers <- answer
	}()
	w.awaitOutput("term")
	w.put(Order{ID: "b", Command: sh("echo never")})
	w.Stop(time.Now().Add(20 * time.Millisecond))
	if answer := <-answers; *answer.ExitCode != 137 || !strings.Contains(answer.Message, "was killed") {
		t.Errorf("%+v", answer)
	}
	if out := w.output("stdout"); strings.Contains(out, "never") {
		t.Errorf("%q", out)
	}
}

func TestADaemonThatIsLeftIsEndedByOthers(t *testing.T) {
	w := newWorld(t)
	w.put(Order{Command: sh(`trap 'echo term; exit 0' TERM; (trap '' TERM; exec sleep 1000) & echo up $! $$; while :; do sleep 0.01; done`)})
	w.awaitOutput("up")
	var child, pid int
	if _, err := fmt.Sscanf(w.output("stdout"), "up %d %d", &child, &pid); err != nil {
		t.Fatal(err)
	}
	duty := w.current
	w.Leave()
	w.Leave()
	select {
	case <-duty.over:
	case <-time.After(patience):
		t.Fatal("it is still looked after")
	}
	syscall.Kill(pid, syscall.SIGTERM) // as the machine's end does
	w.awaitOutput("term")
	if out := w.output("stdout"); strings.Count(out, "term") != 1 || strings.Count(out, "up") != 1 {
		t.Errorf("told or started more than once: %q", out)
	}
	if err := syscall.Kill(child, 0); err != nil {
		t.Errorf("what it leaves behind was not given its time: %v", err)
	}
	syscall.Kill(child, syscall.SIGKILL)
	w.put(Order{ID: "late", Command: sh("echo never")})
	if status := w.awaitState(Exited); status.Message != "it was ended before it ran" {
		t.Errorf("%+v", status)
	}
}
