package setup

import (
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"fused/internal/fault"
)

func b64(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

func file(text, mode string) File { return File{ContentB64: b64(text), Mode: mode} }

func reasonOf(err error) string {
	var f *fault.Fault
	if errors.As(err, &f) {
		return f.Reason
	}
	return ""
}

// world is a keeper with a folder for secrets and one for files.
type world struct {
	*Keeper
	secrets, disk string
	changes       int
}

func newWorld(t *testing.T) *world {
	w := &world{secrets: t.TempDir(), disk: t.TempDir()}
	w.Keeper = New(w.secrets, func() { w.changes++ })
	return w
}

func (w *world) mustApply(t *testing.T, body Body) {
	t.Helper()
	if err := w.Apply(body); err != nil {
		t.Fatal(err)
	}
}

func (w *world) mustHold(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	found, err := os.ReadFile(path)
	info, statErr := os.Stat(path)
	if err != nil || statErr != nil || string(found) != text || info.Mode() != mode {
		t.Errorf("%s: %q %v %v %v, want %q %v", path, found, info, err, statErr, text, mode)
	}
}

func TestASetupWritesSecretsAndFilesWithTheirModes(t *testing.T) {
	w := newWorld(t)
	w.mustApply(t, Body{
		ID:   "u/1",
		Fuse: map[string]File{"auth-token": file("s3cret", ""), "tls/key.pem": file("key", "0640")},
		Files: map[string]File{
			w.disk + "/a/b/run.sh": file("#!/bin/sh\n", "0755"), w.disk + "/plain": file("x", ""),
		},
		Env: map[string]string{"K": "V"}, Workdir: w.disk + "/work/here",
	})
	w.mustHold(t, w.secrets+"/auth-token", "s3cret", 0o600)
	w.mustHold(t, w.secrets+"/tls/key.pem", "key", 0o640)
	w.mustHold(t, w.disk+"/a/b/run.sh", "#!/bin/sh\n", 0o755)
	w.mustHold(t, w.disk+"/plain", "x", 0o644)
	if info, err := os.Stat(w.secrets + "/tls"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info, err)
	}
	if info, err := os.Stat(w.disk + "/work/here"); err != nil || !info.IsDir() {
		t.Errorf("%v %v", info, err)
	}
	env, workdir := w.Defaults()
	if w.ID() != "u/1" || env["K"] != "V" || workdir != w.disk+"/work/here" || w.changes != 1 {
		t.Errorf("%q %v %q %d", w.ID(), env, workdir, w.changes)
	}
}

func TestTheSameIdIsAppliedOnceAndAnotherReplaces(t *testing.T) {
	w := newWorld(t)
	first := Body{
		ID: "1", Env: map[string]string{"A": "1"}, Workdir: w.disk,
		Fuse:  map[string]File{"gone/deep/secret": file("1", ""), "stays": file("1", "")},
		Files: map[string]File{w.disk + "/file": file("1", "0600")},
	}
	w.mustApply(t, first)
	os.WriteFile(w.disk+"/file", []byte("edited"), 0o600)
	w.mustApply(t, first)
	w.mustHold(t, w.disk+"/file", "edited", 0o600)
	os.WriteFile(w.secrets+"/agent", []byte("a program"), 0o700)
	w.mustApply(t, Body{ID: "2", Env: map[string]string{"B": "2"}, Fuse: map[string]File{"stays": file("2", "")}})
	w.mustHold(t, w.secrets+"/stays", "2", 0o600)
	w.mustHold(t, w.secrets+"/agent", "a program", 0o700)
	w.mustHold(t, w.disk+"/file", "edited", 0o600)
	if _, err := os.Stat(w.secrets + "/gone"); !os.IsNotExist(err) {
		t.Error("a secret that was withdrawn is still there")
	}
	env, workdir := w.Defaults()
	if _, old := env["A"]; old || env["B"] != "2" || workdir != "" || w.changes != 2 {
		t.Errorf("%v %q %d", env, workdir, w.changes)
	}
}

func TestWhatIsRefusedLeavesNothing(t *testing.T) {
	w := newWorld(t)
	os.Symlink(w.secrets, w.disk+"/to-secrets")
	os.Symlink("/proc/self", w.disk+"/to-proc")
	os.Symlink(w.disk+"/loop", w.disk+"/loop")
	os.Symlink("to-secrets/../"+filepath.Base(w.secrets)+"/x", w.disk+"/relative")
	os.Symlink("/dev/null", w.disk+"/device")
	os.Mkdir(w.disk+"/dir", 0o755)
	os.WriteFile(w.disk+"/plain", nil, 0o644)
	good := map[string]File{"good": file("x", "")}
	for name, c := range map[string]struct {
		body   Body
		reason string
	}{
		"no id":            {Body{}, "bad_request"},
		"a long id":        {Body{ID: strings.Repeat("x", 201)}, "bad_request"},
		"an id with lines": {Body{ID: "a\nb"}, "bad_request"},
		"a bad variable":   {Body{ID: "x", Env: map[string]string{"A=B": ""}}, "bad_request"},
		"a NUL":            {Body{ID: "x", Env: map[string]string{"A": "\x00"}}, "bad_request"},
		"no base64":        {Body{ID: "x", Files: map[string]File{w.disk + "/f": {ContentB64: "%"}}}, "bad_request"},
		"a bad mode":       {Body{ID: "x", Files: map[string]File{w.disk + "/f": file("", "9")}}, "bad_request"},
		"a relative file":  {Body{ID: "x", Files: map[string]File{"f": file("", "")}}, "bad_path"},
		"the folder":       {Body{ID: "x", Files: map[string]File{w.secrets + "/f": file("", "")}}, "bad_path"},
		"the folder, odd":  {Body{ID: "x", Files: map[string]File{w.disk + "/.." + "/" + filepath.Base(w.disk) + "/../" + filepath.Base(w.secrets) + "/f": file("", "")}}, "bad_path"},
		"by a link":        {Body{ID: "x", Files: map[string]File{w.disk + "/to-secrets/f": file("", "")}}, "bad_path"},
		"by a final link":  {Body{ID: "x", Files: map[string]File{w.disk + "/to-secrets": file("", "")}}, "bad_path"},
		"into proc":        {Body{ID: "x", Files: map[string]File{w.disk + "/to-proc/f": file("", "")}}, "bad_path"},
		"a device":         {Body{ID: "x", Files: map[string]File{w.disk + "/device": file("", "")}}, "bad_path"},
		"dev":              {Body{ID: "x", Files: map[string]File{"/dev/null": file("", "")}}, "bad_path"},
		"sys":              {Body{ID: "x", Files: map[string]File{"/sys/x": file("", "")}}, "bad_path"},
		"a loop":           {Body{ID: "x", Files: map[string]File{w.disk + "/loop/f": file("", "")}}, "bad_path"},
		"a directory":      {Body{ID: "x", Files: map[string]File{w.disk + "/dir": file("", "")}}, "is_a_directory"},
		"the root":         {Body{ID: "x", Files: map[string]File{"/": file("", "")}}, "is_a_directory"},
		"a workdir below":  {Body{ID: "x", Workdir: w.disk + "/plain/x"}, "not_a_directory"},
		"a workdir there":  {Body{ID: "x", Workdir: w.secrets}, "bad_path"},
		"a relative dir":   {Body{ID: "x", Workdir: "work"}, "bad_path"},
		"up":               {Body{ID: "x", Fuse: map[string]File{"../x": file("", "")}}, "bad_path"},
		"an absolute name": {Body{ID: "x", Fuse: map[string]File{"/x": file("", "")}}, "bad_path"},
		"an empty name":    {Body{ID: "x", Fuse: map[string]File{"": file("", "")}}, "bad_path"},
		"a dot":            {Body{ID: "x", Fuse: map[string]File{".": file("", "")}}, "bad_path"},
		"an unclean name":  {Body{ID: "x", Fuse: map[string]File{"a//b": file("", "")}}, "bad_path"},
		"the daemon":       {Body{ID: "x", Fuse: map[string]File{"agent": file("", "")}}, "bad_path"},
		"below the daemon": {Body{ID: "x", Fuse: map[string]File{"agent/x": file("", "")}}, "bad_path"},
	} {
		if c.body.Fuse == nil {
			c.body.Fuse = good
		}
		err := w.Apply(c.body)
		if reasonOf(fault.OnPath("", err)) != c.reason {
			t.Errorf("%s: %v, want %s", name, err, c.reason)
		}
		if w.ID() != "" || w.changes != 0 {
			t.Fatalf("%s was applied", name)
		}
		if left, _ := os.ReadDir(w.secrets); len(left) != 0 {
			t.Fatalf("%s left %v", name, left)
		}
	}
	if info, err := os.Stat("/dev/null"); err != nil || info.Mode().IsRegular() {
		t.Fatal("/dev/null is a file")
	}
}

func TestTooManyFilesAreRefused(t *testing.T) {
	w := newWorld(t)
	body := Body{ID: "x", Fuse: map[string]File{}}
	for i := range maxEntries + 1 {
		body.Fuse[strconv.Itoa(i)] = File{}
	}
	if reasonOf(w.Apply(body)) != "bad_request" {
		t.Error("accepted")
	}
}

func TestLinksBelowTheFolderAreReplacedNotFollowed(t *testing.T) {
	w := newWorld(t)
	os.Symlink(w.disk, w.secrets+"/tls")
	os.Symlink(w.disk+"/stolen", w.secrets+"/auth-token")
	w.mustApply(t, Body{ID: "1", Fuse: map[string]File{"tls/key": file("key", ""), "auth-token": file("s3cret", "")}})
	if left, _ := os.ReadDir(w.disk); len(left) != 0 {
		t.Errorf("secrets went to %v", left)
	}
	w.mustHold(t, w.secrets+"/tls/key", "key", 0o600)
	w.mustHold(t, w.secrets+"/auth-token", "s3cret", 0o600)
}

func TestLinksOfTheDiskAreFollowed(t *testing.T) {
	w := newWorld(t)
	os.Mkdir(w.disk+"/real", 0o755)
	os.Symlink("real", w.disk+"/link")
	os.Symlink("../real/target", w.disk+"/real/file")
	w.mustApply(t, Body{ID: "1", Files: map[string]File{w.disk + "/link/file": file("x", "0600")}})
	w.mustHold(t, w.disk+"/real/target", "x", 0o600)
}

func TestAnAgentWithoutAFolderTakesNoSecrets(t *testing.T) {
	k := New("", func() {})
	if err := k.Apply(Body{ID: "1", Fuse: map[string]File{"x": file("", "")}}); reasonOf(err) != "not_supported" {
		t.Error(err)
	}
	if err := k.Apply(Body{ID: "1", Env: map[string]string{"A": "1"}}); err != nil {
		t.Error(err)
	}
}

// TestAFullFolderSaysSo mounts in a namespace of its thread, which ends with it.
func TestAFullFolderSaysSo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	folder, result := t.TempDir(), make(chan string)
	go func() {
		defer close(result)
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		err := syscall.Unshare(syscall.CLONE_NEWNS)
		if err == nil {
			err = syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
		}
		if err == nil {
			err = syscall.Mount("tmpfs", folder, "tmpfs", 0, "size=64k")
		}
		if err != nil {
			result <- "skip: " + err.Error()
			return
		}
		k := New(folder, func() {})
		err = k.Apply(Body{ID: "1", Fuse: map[string]File{"big": file(strings.Repeat("x", 100<<10), "")}})
		left, _ := os.ReadDir(folder)
		result <- reasonOf(err) + " " + strconv.Itoa(len(left)) + " " + k.ID()
	}()
	if got := <-result; strings.HasPrefix(got, "skip") {
		t.Skip(got)
	} else if got != "no_space_in_guest 0 " {
		t.Error(got)
	}
}

func FuzzPlace(f *testing.F) {
	f.Add("/a/b", "/x")
	f.Add("//../fuse/x", "..")
	f.Add("/link/x", "/fuse")
	f.Add("/link", "../../../dev/null")
	f.Fuzz(func(t *testing.T, path, target string) {
		k := New("/fuse", func() {})
		disk := t.TempDir()
		os.Symlink(target, disk+"/link")
		for _, asked := range []string{path, disk + path} {
			place, err := k.place(asked)
			if err != nil {
				continue
			}
			for _, folder := range append([]string{"/fuse"}, kernelFolders...) {
				if isBelow(place, folder) || filepath.Clean(place) != place {
					t.Errorf("%q leads to %q", asked, place)
				}
			}
		}
		if checkName(path) == nil && !strings.HasPrefix(filepath.Join("/fuse", path), "/fuse/") {
			t.Errorf("the name %q leaves the folder", path)
		}
	})
}
