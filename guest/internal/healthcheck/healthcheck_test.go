package healthcheck

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fused/internal/account"
	"fused/internal/board"
	"fused/internal/fault"
	"fused/internal/process"
	"fused/internal/reap"
)

const patience = 30 * time.Second

type world struct {
	*Checker
	t     *testing.T
	board *board.Board
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, board: board.New()}
	reaper := reap.New(false, nil)
	w.Checker = New(Config{
		Launcher: &process.Launcher{Reaper: reaper}, Changed: w.board.Changed,
		Resolve: func(r process.Request) (process.Spec, error) { return r.Resolve(process.Defaults{}, account.System) },
	})
	t.Cleanup(func() {
		w.Set(nil)
		awaitNone(t)
		reaper.Stop()
	})
	return w
}

// awaitNone fails when a goroutine of the checker goes on.
func awaitNone(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		if !strings.Contains(string(buf[:runtime.Stack(buf, true)]), "healthcheck.(*Checker)") {
			return
		}
	}
	t.Errorf("goroutines are left:\n%s", buf[:runtime.Stack(buf, true)])
}

func (w *world) await(state string) Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		version := w.board.Version()
		status := w.Status()
		if status != nil && status.State == state {
			return *status
		}
		if ctx.Err() != nil {
			w.t.Fatalf("never %s: %+v", state, status)
		}
		w.board.Wait(ctx, version)
	}
}

func quick(plan Plan) *Plan {
	plan.Interval, plan.Retries = 5*time.Millisecond, max(plan.Retries, 2)
	if plan.Timeout == 0 {
		plan.Timeout = patience
	}
	return &plan
}

func TestBodies(t *testing.T) {
	for text, field := range map[string]string{
		`{}`: "none", `{"http":null,"exec":[],"interval_seconds":10}`: "none",
		`{"http":{"port":80}}`: "", `{"exec":["true"],"timeout_seconds":10}`: "", `{"http":{"port":80},"interval_seconds":1}`: "",
		`{"http":{"port":80},"exec":["x"]}`: "http", `{"http":{"port":0}}`: "http.port", `{"http":{"port":65536}}`: "http.port",
		`{"http":{"port":80,"path":"x"}}`: "http.path", `{"http":{"port":80,"path":"@evil/"}}`: "http.path",
		`{"http":{"port":80,"path":"/a#b"}}`: "http.path", `{"http":{"port":80,"path":"/\n"}}`: "http.path",
		`{"exec":[""]}`: "exec", `{"exec":["a","\u0000"]}`: "exec", `{"exec":["x"],"interval_seconds":0}`: "interval_seconds",
		`{"exec":["x"],"timeout_seconds":11}`: "timeout_seconds", `{"exec":["x"],"timeout_seconds":0}`: "timeout_seconds",
		`{"exec":["x"],"retries":0}`: "retries", `{"exec":["x"],"start_period_seconds":-1}`: "start_period_seconds",
	} {
		var body Body
		if err := json.Unmarshal([]byte(text), &body); err != nil {
			t.Fatal(text, err)
		}
		plan, err := body.Plan()
		found := ""
		var f *fault.Fault
		switch {
		case errors.As(err, &f):
			found = f.Details["field"]
		case plan == nil:
			found = "none"
		}
		if found != field {
			t.Errorf("%s: %q %v, want %q", text, found, err, field)
		}
	}
}

func TestDefaults(t *testing.T) {
	plan, err := Body{HTTP: &HTTP{Port: 8080}}.Plan()
	want := Plan{URL: "http://127.0.0.1:8080/", Interval: 10 * time.Second, Timeout: 2 * time.Second, Retries: 3}
	if err != nil || plan.URL != want.URL || plan.Interval != want.Interval || plan.Timeout != want.Timeout || plan.Retries != 3 || plan.StartPeriod != 0 {
		t.Errorf("%+v %v", plan, err)
	}
}

func FuzzBodies(f *testing.F) {
	f.Add(`{"http":{"port":80,"path":"/x?y=%20"}}`)
	f.Add(`{"exec":["a"],"retries":1}`)
	f.Fuzz(func(t *testing.T, text string) {
		var body Body
		if json.Unmarshal([]byte(text), &body) != nil {
			return
		}
		plan, err := body.Plan()
		if err != nil || plan == nil {
			return
		}
		if plan.Timeout > plan.Interval || plan.Timeout <= 0 || plan.Retries < 1 || (plan.URL == "") == (len(plan.Exec) == 0) {
			t.Errorf("%q: %+v", text, plan)
		}
		if plan.URL != "" {
			if parsed, err := url.Parse(plan.URL); err != nil || parsed.Hostname() != "127.0.0.1" {
				t.Errorf("%q asks %q", text, plan.URL)
			}
		}
	})
}

func TestVerdicts(t *testing.T) {
	plan := Plan{Retries: 3, StartPeriod: 10 * time.Second}
	status := Status{State: Starting, SinceMS: 1}
	// second, problem, state, failures
	for i, step := range []struct {
		age      int
		problem  string
		state    string
		failures int
	}{
		{0, "no", Starting, 0}, {9, "no", Starting, 0}, {10, "no", Starting, 1}, {11, "no", Starting, 2}, {12, "no", Failing, 3},
		{13, "no", Failing, 4}, {14, "", Passing, 0}, {15, "no", Passing, 1}, {16, "no", Passing, 2}, {17, "", Passing, 0},
		{18, "no", Passing, 1}, {19, "no", Passing, 2}, {20, "no", Failing, 3}, {21, "", Passing, 0},
	} {
		before := status
		now := time.UnixMilli(int64(1000 + step.age))
		status = plan.judge(before, step.problem, time.Duration(step.age)*time.Second, now)
		if status.State != step.state || status.Failures != step.failures || status.Message != step.problem {
			t.Errorf("step %d: %+v", i, status)
		}
		if (status.SinceMS == now.UnixMilli()) != (status.State != before.State) {
			t.Errorf("step %d: since %d", i, status.SinceMS)
		}
	}
	// A pass ends the start period.
	status = plan.judge(Status{State: Passing}, "no", time.Second, time.Now())
	if status.Failures != 1 {
		t.Errorf("%+v", status)
	}
}

func TestHTTP(t *testing.T) {
	var code atomic.Int64
	code.Store(500)
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.String() != "/health?deep=1" || r.Method != "GET" {
			t.Errorf("%s %s", r.Method, r.URL)
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(int(code.Load()))
	}))
	defer site.Close()
	w := newWorld(t)
	w.Set(quick(Plan{URL: site.URL + "/health?deep=1"}))
	if status := w.await(Failing); !strings.HasSuffix(status.Message, "status 500") || status.Failures < 2 {
		t.Errorf("%+v", status)
	}
	for _, good := range []int64{200, 302, 399} {
		code.Store(good)
		if status := w.await(Passing); status.Message != "" || status.Failures != 0 {
			t.Errorf("%+v", status)
		}
		code.Store(400)
		w.await(Failing)
	}
}

func TestNobodyListensOrAnswers(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := "http://127.0.0.1:" + strconv.Itoa(listener.Addr().(*net.TCPAddr).Port) + "/"
	w := newWorld(t)
	w.Set(quick(Plan{URL: target, Timeout: 20 * time.Millisecond}))
	if status := w.await(Failing); !strings.Contains(status.Message, "no answer within 20ms") {
		t.Errorf("%+v", status)
	}
	listener.Close()
	w.Set(quick(Plan{URL: target}))
	if status := w.await(Failing); !strings.Contains(status.Message, "connection refused") || strings.Count(status.Message, target) != 1 {
		t.Errorf("%+v", status)
	}
}

func TestExec(t *testing.T) {
	w := newWorld(t)
	for words, argv := range map[string][]string{
		"sh ended with exit code 3: sick\nvery": {"sh", "-c", "echo sick >&2; printf '\\001very' >&2; exit 3"},
		"sh was ended by the signal TERM":       {"sh", "-c", "kill -TERM $$"},
		`no executable program "no-such"`:       {"no-such"},
	} {
		w.Set(quick(Plan{Exec: argv}))
		if status := w.await(Failing); !strings.Contains(status.Message, words) {
			t.Errorf("%v: %q", argv, status.Message)
		}
	}
	w.Set(quick(Plan{Exec: []string{"sleep", "1000"}, Timeout: 20 * time.Millisecond}))
	if status := w.await(Failing); status.Message != "sleep was not done within 20ms" {
		t.Errorf("%+v", status)
	}
	w.Set(quick(Plan{Exec: []string{"true"}}))
	w.await(Passing)
}

func TestTheVerdictFollowsWhatHappens(t *testing.T) {
	flag := t.TempDir() + "/flag"
	w := newWorld(t)
	w.Set(quick(Plan{Exec: []string{"test", "-e", flag}}))
	w.await(Failing)
	os.WriteFile(flag, nil, 0o600)
	w.await(Passing)
	os.Remove(flag)
	w.await(Failing)
}

func TestSetBeginsAnewAndNilEnds(t *testing.T) {
	w := newWorld(t)
	w.Set(quick(Plan{Exec: []string{"true"}}))
	w.await(Passing)
	slow := quick(Plan{Exec: []string{"sleep", "1000"}})
	w.Set(slow)
	if status := w.Status(); status.State != Starting {
		t.Errorf("%+v", status)
	}
	w.Set(nil) // also while a check is under way
	if w.Status() != nil {
		t.Error("still there")
	}
	w.Set(nil)
}
