package process

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"fused/internal/account"
	"fused/internal/cgroup"
	"fused/internal/fault"
	"fused/internal/reap"
)

const patience = 20 * time.Second

// launchers returns one launcher that knows cgroups, where the host has them,
// and one that does not.
func launchers(t *testing.T) map[string]*Launcher {
	t.Helper()
	reaper := reap.New(false, nil)
	t.Cleanup(reaper.Stop)
	all := map[string]*Launcher{"groups": {Reaper: reaper}}
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		path := filepath.Join(root, "fused-test-"+strconv.Itoa(os.Getpid())+"-"+strconv.FormatInt(time.Now().UnixNano(), 36))
		tree, err := cgroup.Open(path)
		if err != nil {
			continue
		}
		t.Cleanup(func() { removeTree(t, tree, path) })
		all["cgroups"] = &Launcher{Reaper: reaper, Cgroups: tree}
		break
	}
	return all
}

func removeTree(t *testing.T, tree *cgroup.Tree, path string) {
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		tree.Sweep()
		if os.Remove(path) == nil {
			return
		}
	}
	t.Errorf("cgroup %s is still in use", path)
}

// each runs a test with every launcher.
func each(t *testing.T, test func(t *testing.T, l *Launcher)) {
	for name, l := range launchers(t) {
		t.Run(name, func(t *testing.T) {
			test(t, l)
			if n := l.Running(); n != 0 {
				t.Errorf("%d commands are still counted as running", n)
			}
		})
	}
}

// capture is a sink that remembers.
type capture struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (c *capture) take(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Write(p)
}

func (c *capture) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

func (c *capture) await(t *testing.T, text string) {
	t.Helper()
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		if strings.Contains(c.String(), text) {
			return
		}
	}
	t.Fatalf("%q did not come; there is %q", text, c.String())
}

type running struct {
	*Command
	out, err capture
}

func start(t *testing.T, l *Launcher, request Request, change ...func(*Options)) *running {
	t.Helper()
	spec, err := request.Resolve(Defaults{}, account.System)
	if err != nil {
		t.Fatal(err)
	}
	r := &running{}
	opts := Options{
		Stdout: r.out.take, Stderr: r.err.take, Timeout: request.Timeout(), TTY: request.TTY, Rows: request.Rows, Cols: request.Cols,
	}
	for _, c := range change {
		c(&opts)
	}
	if r.Command, err = l.Start(spec, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Kill()
		r.finish(t)
	})
	return r
}

func sh(script string) Request {
	return Request{Cmd: []string{"/bin/sh", "-c", script}}
}

func (r *running) finish(t *testing.T) Exit {
	t.Helper()
	select {
	case <-r.Finished():
	case <-time.After(patience):
		t.Fatal("the command did not end")
	}
	return r.Exit()
}

func withStdin(data []byte) func(*Options) {
	return func(o *Options) { o.UseStdin, o.Stdin = true, data }
}

func keepStdin(o *Options) { o.UseStdin, o.KeepStdin = true, true }

func TestOutputIsKeptByteForByte(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		every := make([]byte, 256)
		for i := range every {
			every[i] = byte(i)
		}
		data := bytes.Repeat(every, 4000)
		r := start(t, l, sh("cat; printf 'oh\\0no' >&2; exit 3"), withStdin(data))
		exit := r.finish(t)
		if r.out.String() != string(data) || r.err.String() != "oh\x00no" {
			t.Errorf("output differs: %d bytes, %q", len(r.out.String()), r.err.String())
		}
		if exit.ExitCode != 3 || exit.Signal != "" || exit.TimedOut {
			t.Errorf("exit %+v", exit)
		}
	})
}

func TestASignalledCommandSaysSo(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		exit := start(t, l, sh("kill -SEGV $$")).finish(t)
		if exit.ExitCode != 128+11 || exit.Signal != "SEGV" {
			t.Errorf("exit %+v", exit)
		}
		r := start(t, l, sh("sleep 100"))
		r.Signal(syscall.SIGTERM)
		if exit := r.finish(t); exit.ExitCode != 143 || exit.Signal != "TERM" {
			t.Errorf("exit %+v", exit)
		}
	})
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func awaitDeath(t *testing.T, pid int) {
	t.Helper()
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		if !alive(pid) {
			return
		}
	}
	t.Errorf("process %d lives on", pid)
}

func TestTheTimeLimitKillsTheWholeTree(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		script := "sleep 300 & echo $!; (trap '' HUP TERM; sleep 300) & echo $!; "
		if l.Cgroups != nil { // only a cgroup knows those that left the session
			script += "setsid sh -c 'echo $$; exec sleep 300' & "
		}
		request := sh(script + "wait")
		request.TimeoutMS = 300
		r := start(t, l, request)
		exit := r.finish(t)
		if exit.ExitCode != 124 || !exit.TimedOut || exit.Signal != "" || exit.DurationMS < 290 {
			t.Errorf("exit %+v", exit)
		}
		pids := strings.Fields(r.out.String())
		if len(pids) < 2 {
			t.Fatalf("the tree was not there: %q", r.out.String())
		}
		for _, text := range pids {
			pid, _ := strconv.Atoi(text)
			awaitDeath(t, pid)
		}
	})
}

func TestBackgroundWorkThatHoldsStdoutDoesNotDelayTheEnd(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		begin := time.Now()
		r := start(t, l, sh("sleep 300 & head -c 60000 /dev/zero; echo end; exit 6"))
		exit := r.finish(t)
		if exit.ExitCode != 6 || time.Since(begin) > 10*time.Second {
			t.Errorf("exit %+v after %v", exit, time.Since(begin))
		}
		if out := r.out.String(); len(out) != 60004 || !strings.HasSuffix(out, "end\n") {
			t.Errorf("%d bytes of output", len(out))
		}
		r.Kill() // the sleep
		if l.Cgroups == nil {
			for _, pid := range sessionMembers(r.PID) {
				awaitDeath(t, pid)
			}
		}
	})
}

func TestBackgroundWorkThatGoesOnWritingDoesNotDelayTheEnd(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, sh("yes & sleep 0.1; exit 2"))
		if exit := r.finish(t); exit.ExitCode != 2 {
			t.Errorf("exit %+v", exit)
		}
	})
}

func TestLargeInputIsDelivered(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		data := bytes.Repeat([]byte("0123456789abcdef"), 20<<16)
		sum := sha256.Sum256(data)
		r := start(t, l, Request{Cmd: []string{"sha256sum"}}, withStdin(data))
		r.finish(t)
		if !strings.HasPrefix(r.out.String(), hex.EncodeToString(sum[:])) {
			t.Errorf("got %q", r.out.String())
		}
	})
}

func TestACommandThatIgnoresItsInputEnds(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		data := make([]byte, 20<<20)
		if exit := start(t, l, sh("exit 0"), withStdin(data)).finish(t); exit.ExitCode != 0 {
			t.Errorf("exit %+v", exit)
		}
		if exit := start(t, l, sh("exec <&-; sleep 0.1"), withStdin(data)).finish(t); exit.ExitCode != 0 {
			t.Errorf("exit %+v", exit)
		}
		// The input is held open by background work that does not read it.
		if exit := start(t, l, sh("sleep 300 <&0 & exit 1"), withStdin(data)).finish(t); exit.ExitCode != 1 {
			t.Errorf("exit %+v", exit)
		}
	})
}

func TestWithoutInputThereIsDevNull(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		const script = "readlink /proc/self/fd/0; ls /proc/self/fd | wc -l"
		r := start(t, l, sh(script))
		r.finish(t)
		// os/exec closes everything but 0, 1 and 2: so do we.
		want, err := exec.Command("/bin/sh", "-c", script).Output()
		if got := r.out.String(); got != string(want) || err != nil {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestAnOpenInputTakesMoreUntilItsEnd(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, sh("cat"), keepStdin, func(o *Options) { o.Stdin = []byte("one ") })
		ctx := context.Background()
		if n, err := r.Input().Append(ctx, strings.NewReader("two "), false); n != 4 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := r.Input().Append(ctx, strings.NewReader("three"), true); n != 5 || err != nil {
			t.Fatal(n, err)
		}
		r.finish(t)
		if r.out.String() != "one two three" {
			t.Errorf("got %q", r.out.String())
		}
		if _, err := r.Input().Append(ctx, strings.NewReader("x"), false); err != ErrInputClosed {
			t.Errorf("after the end: %v", err)
		}
	})
}

func TestAWriterOfInputThatGivesUpIsReleased(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, sh("sleep 300"), keepStdin)
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		_, err := r.Input().Append(ctx, bytes.NewReader(make([]byte, 1<<20)), false)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		r.Kill()
		r.finish(t)
	})
}

func TestHangUpEndsACommand(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		polite := start(t, l, sh("trap 'echo bye; exit 5' HUP; echo ready; while :; do sleep 0.05; done"))
		polite.out.await(t, "ready")
		polite.HangUp()
		if exit := polite.finish(t); exit.ExitCode != 5 || !strings.Contains(polite.out.String(), "bye") {
			t.Errorf("exit %+v", exit)
		}
		stubborn := start(t, l, sh("trap '' HUP; echo ready; while :; do sleep 0.05; done"))
		stubborn.out.await(t, "ready")
		begin := time.Now()
		stubborn.HangUp()
		if exit := stubborn.finish(t); exit.Signal != "KILL" || time.Since(begin) < hangUpGrace {
			t.Errorf("exit %+v after %v", exit, time.Since(begin))
		}
	})
}

func tty(script string) Request {
	r := sh(script)
	r.TTY, r.Rows, r.Cols = true, 33, 99
	return r
}

func TestATerminal(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, tty("tty; stty size; trap 'stty size' WINCH; echo ready; until read a; do :; done; echo got $a; exec sleep 300"), keepStdin)
		r.out.await(t, "ready")
		if !strings.Contains(r.out.String(), "/dev/pts/") || !strings.Contains(r.out.String(), "33 99") {
			t.Errorf("got %q", r.out.String())
		}
		r.Resize(10, 20)
		r.Input().Append(context.Background(), strings.NewReader("line\r"), false)
		r.out.await(t, "got line")
		r.out.await(t, "10 20")
		// ^C reaches the foreground group through the line discipline.
		r.Input().Append(context.Background(), strings.NewReader("\x03"), false)
		if exit := r.finish(t); exit.Signal != "INT" {
			t.Errorf("exit %+v", exit)
		}
	})
}

func TestASignalGoesToTheForegroundGroupOfATerminal(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		// An interactive shell puts jobs into groups of their own.
		r := start(t, l, tty("exec sh -i"), keepStdin)
		r.Input().Append(context.Background(), strings.NewReader("sleep 299\n"), false)
		group := 0
		for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
			if group, _ = r.terminal.Foreground(); group != r.PID && group > 0 {
				break
			}
		}
		if group == r.PID {
			t.Fatal("the job did not come to the foreground")
		}
		r.Signal(syscall.SIGINT)
		r.Input().Append(context.Background(), strings.NewReader("echo code=$?\nexit 7\n"), false)
		if exit := r.finish(t); exit.ExitCode != 7 {
			t.Errorf("exit %+v", exit)
		}
		if !strings.Contains(r.out.String(), "code=130") {
			t.Errorf("got %q", r.out.String())
		}
	})
}

func TestATerminalsLastWordsAreDelivered(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		for range 20 {
			r := start(t, l, tty("sleep 300 & head -c 30000 /dev/zero | tr '\\0' x; printf LAST"), keepStdin)
			r.finish(t)
			if out := r.out.String(); len(out) != 30004 || !strings.HasSuffix(out, "LAST") {
				t.Fatalf("%d bytes", len(out))
			}
			r.Kill()
		}
	})
}

func TestTheEndOfATerminalsInputIsAKey(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, tty("cat; echo over"), keepStdin)
		r.Input().Append(context.Background(), strings.NewReader("x\n"), true)
		if exit := r.finish(t); exit.ExitCode != 0 || !strings.Contains(r.out.String(), "over") {
			t.Errorf("%+v %q", exit, r.out.String())
		}
	})
}

func TestCommandsRunAsTheirUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	each(t, func(t *testing.T, l *Launcher) {
		request := sh("id -u; id -g; id -G; umask")
		request.User = "12345:54321"
		r := start(t, l, request)
		r.finish(t)
		if got := strings.Fields(r.out.String()); len(got) < 3 || got[0] != "12345" || got[1] != "54321" || got[2] != "54321" {
			t.Errorf("got %q %q", r.out.String(), r.err.String())
		}
	})
}

func wantReason(t *testing.T, err error, reason string) {
	t.Helper()
	var f *fault.Fault
	if !errors.As(err, &f) || f.Reason != reason {
		t.Errorf("got %v, want the reason %s", err, reason)
	}
}

func TestWhatCannotBeStarted(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o700)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	foreign := write("foreign", "\x7fELF nonsense", 0o755)
	noInterpreter := write("script", "#!/no/such/interpreter\n", 0o755)
	plain := write("plain", "text", 0o644)
	text := "x"
	cases := []struct {
		name, reason string
		request      Request
	}{
		{"nothing", "bad_request", Request{}},
		{"both", "bad_request", Request{Cmd: []string{"true"}, Shell: &text}},
		{"NUL", "bad_request", Request{Cmd: []string{"true", "a\x00b"}}},
		{"bad variable", "bad_request", Request{Cmd: []string{"true"}, Env: map[string]string{"A=B": "c"}}},
		{"negative limit", "bad_request", Request{Cmd: []string{"true"}, TimeoutMS: -1}},
		{"size", "bad_request", Request{Cmd: []string{"true"}, TTY: true, Rows: 70000}},
		{"empty name", "bad_request", Request{Cmd: []string{""}}},
		{"too long", "bad_request", Request{Cmd: []string{"true", strings.Repeat("x", 200<<10)}}},
		{"unknown", "command_not_found", Request{Cmd: []string{"no-such-program"}}},
		{"unknown path", "command_not_found", Request{Cmd: []string{"/no/such/program"}}},
		{"folder", "command_not_found", Request{Cmd: []string{"/tmp"}}},
		{"not executable", "command_not_found", Request{Cmd: []string{plain}}},
		{"foreign program", "command_not_found", Request{Cmd: []string{foreign}}},
		{"missing interpreter", "command_not_found", Request{Cmd: []string{noInterpreter}}},
		{"missing folder", "bad_cwd", Request{Cmd: []string{"true"}, Cwd: "/no/such/folder"}},
		{"relative folder", "bad_cwd", Request{Cmd: []string{"true"}, Cwd: "tmp"}},
		{"folder is a file", "bad_cwd", Request{Cmd: []string{"true"}, Cwd: plain}},
		{"forbidden folder", "bad_cwd", Request{Cmd: []string{"true"}, Cwd: dir, User: "12345"}},
		{"unknown user", "unknown_user", Request{Cmd: []string{"true"}, User: "nobody-here"}},
	}
	each(t, func(t *testing.T, l *Launcher) {
		for _, c := range cases {
			if c.name == "forbidden folder" && os.Geteuid() != 0 {
				continue
			}
			t.Run(c.name, func(t *testing.T) {
				spec, err := c.request.Resolve(Defaults{}, account.System)
				if err == nil {
					_, err = l.Start(spec, Options{Stdout: func([]byte) {}, Stderr: func([]byte) {}})
				}
				wantReason(t, err, c.reason)
			})
		}
	})
}

func TestTheImagesOwnCommandIsRunWhenAskedFor(t *testing.T) {
	d := Defaults{Command: []string{"true", "of", "the image"}}
	r := Request{ImageCommand: true}
	spec, err := r.Resolve(d, account.System)
	if err != nil || strings.Join(spec.Argv, " ") != "true of the image" {
		t.Fatalf("%v %v", spec.Argv, err)
	}
	text := "true"
	for _, bad := range []Request{{ImageCommand: true, Cmd: []string{"true"}}, {ImageCommand: true, Shell: &text}, {}} {
		_, err := bad.Resolve(d, account.System)
		wantReason(t, err, "bad_request")
	}
	_, err = r.Resolve(Defaults{}, account.System)
	wantReason(t, err, "bad_request")
}

func TestTheEnvironmentIsLayered(t *testing.T) {
	d := Defaults{
		ImageEnv: map[string]string{"A": "image", "B": "image", "C": "image", "PATH": "/bin:/usr/bin"},
		Env:      map[string]string{"B": "configure", "C": "configure"},
		Workdir:  "/no/such/folder", User: "0",
	}
	r := Request{Cmd: []string{"true"}, Env: map[string]string{"C": "request"}, TTY: true}
	spec, err := r.Resolve(d, account.System)
	if err != nil {
		t.Fatal(err)
	}
	env := strings.Join(spec.Env, "\n")
	for _, want := range []string{"A=image", "B=configure", "C=request", "PATH=/bin:/usr/bin", "TERM=xterm-256color", "LANG=C.UTF-8", "USER=root"} {
		if !strings.Contains("\n"+env+"\n", "\n"+want+"\n") {
			t.Errorf("%s is missing in %q", want, env)
		}
	}
	if r.Rows != 24 || r.Cols != 80 {
		t.Errorf("size %d x %d", r.Rows, r.Cols)
	}
	if spec.Dir != "/root" && spec.Dir != "/" { // the image's folder is missing: not an error
		t.Errorf("folder %q", spec.Dir)
	}
}

func TestManyCommandsAtOnce(t *testing.T) {
	each(t, func(t *testing.T, l *Launcher) {
		var group sync.WaitGroup
		for i := range 60 {
			group.Go(func() {
				r := start(t, l, sh(fmt.Sprintf("echo %d; exit %d", i, i)))
				if exit := r.finish(t); exit.ExitCode != i || r.out.String() != strconv.Itoa(i)+"\n" {
					t.Errorf("%d: %+v %q", i, exit, r.out.String())
				}
			})
		}
		group.Wait()
	})
}

func TestSignalNames(t *testing.T) {
	for text, want := range map[string]syscall.Signal{"TERM": 15, "SIGKILL": 9, "int": 2, "10": 10, "64": 64, "WINCH": 28} {
		if got, err := ParseSignal(text); got != want || err != nil {
			t.Errorf("%s: %v %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "65", "-9", "NOPE", "9x"} {
		_, err := ParseSignal(text)
		wantReason(t, err, "unknown_signal")
	}
	if SignalName(9) != "KILL" || SignalName(40) != "40" {
		t.Error("names")
	}
}

func TestADefaultFolderIsOneThatTheUserMayEnter(t *testing.T) {
	root := t.TempDir()
	os.Chmod(filepath.Dir(root), 0o755) // it is made for its owner only
	for _, made := range []struct {
		name string
		mode os.FileMode
	}{{"open", 0o755}, {"own", 0o700}, {"own/inner", 0o755}, {"group", 0o710}, {"not-owner", 0o077}} {
		path := filepath.Join(root, made.name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(path, 0o700) // TempDir removes it
		if err := os.Chmod(path, made.mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(root, "own/inner"), filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("%d:%d", os.Geteuid(), os.Getegid())
	for _, c := range []struct {
		folder, user string
		entered      bool
	}{
		{"open", "12345:12345", true},
		{"own", "12345:12345", false},
		{"own/inner", "12345:12345", false},
		{"link", "12345:12345", false},
		{"group", "12345:12345", false},
		{"group", fmt.Sprintf("12345:%d", os.Getegid()), true},
		{"own/inner", me, true},
		{"not-owner", me, os.Geteuid() == 0},
	} {
		folder := filepath.Join(root, c.folder)
		spec, err := (&Request{Cmd: []string{"true"}, User: c.user}).Resolve(Defaults{Workdir: folder}, account.System)
		if err != nil || (spec.Dir == folder) != c.entered {
			t.Errorf("%s as %s: %q %v", c.folder, c.user, spec.Dir, err)
		}
	}
}
