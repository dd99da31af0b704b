package files

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"fused/internal/fault"
)

func reason(path string, err error) string {
	var f *fault.Fault
	errors.As(fault.OnPath(path, err), &f)
	if f == nil {
		return ""
	}
	return f.Reason
}

func want(t *testing.T, path string, err error, wanted string) {
	t.Helper()
	if got := reason(path, err); got != wanted {
		t.Errorf("%s: %v is %q, want %q", path, err, got, wanted)
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(text)
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name)
	}
	return strings.Join(all, " ")
}

func mode(m uint32) *uint32 { return &m }

func TestCheckPath(t *testing.T) {
	for path, clean := range map[string]string{"/a/../b//c/": "/b/c", "/": "/", "/..": "/"} {
		if got, err := CheckPath(path); got != clean || err != nil {
			t.Errorf("%s: %s %v", path, got, err)
		}
	}
	for _, path := range []string{"", "a", "./a", "/a\x00b"} {
		_, err := CheckPath(path)
		want(t, path, err, "bad_path")
	}
}

func TestWriteIsAtomicAndTellsTheDigest(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new/folder/file")
	data := bytes.Repeat([]byte("fuse"), 300000)
	sum := sha256.Sum256(data)
	written, err := Write(path, Target{Mode: mode(0o4750), Parents: true}, bytes.NewReader(data))
	if err != nil || written.SHA256 != hex.EncodeToString(sum[:]) || written.SizeBytes != int64(len(data)) || written.Path != path {
		t.Fatalf("%+v %v", written, err)
	}
	if e, _ := Stat(path); e.Mode != "04750" || e.Type != "file" || e.SizeBytes != int64(len(data)) {
		t.Errorf("%+v", e)
	}
	// A body that is cut off leaves the old file and nothing else.
	cut := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, err := Write(path, Target{}, cut); err == nil {
		t.Error("no error")
	}
	if content(t, path) != string(data) || names(t, filepath.Dir(path)) != "file" {
		t.Errorf("after a cut-off body: %s", names(t, filepath.Dir(path)))
	}
	// Without a mode the present one stays.
	if _, err := Write(path, Target{}, strings.NewReader("short")); err != nil {
		t.Fatal(err)
	}
	if e, _ := Stat(path); e.Mode != "04750" || content(t, path) != "short" {
		t.Errorf("%+v", e)
	}
}

func TestWriteRefusals(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "file"), "x")
	for path, wanted := range map[string]string{
		dir:                              "is_a_directory",
		filepath.Join(dir, "no/such"):    "file_not_found",
		filepath.Join(dir, "file/below"): "not_a_directory",
	} {
		_, err := Write(path, Target{}, strings.NewReader("y"))
		want(t, path, err, wanted)
	}
	_, err := Write(filepath.Join(dir, "file/a/b"), Target{Parents: true}, strings.NewReader("y"))
	want(t, "parents", err, "not_a_directory")
	if _, err := ParseMode("0999"); err == nil {
		t.Error("bad mode accepted")
	}
}

func TestWriteFollowsLinksAndKeepsThem(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "real"), "old")
	os.Symlink("real", filepath.Join(dir, "link"))
	os.Symlink("not-yet", filepath.Join(dir, "dangling"))
	os.Symlink("loop", filepath.Join(dir, "loop"))
	for _, name := range []string{"link", "dangling"} {
		if _, err := Write(filepath.Join(dir, name), Target{}, strings.NewReader("new")); err != nil {
			t.Fatal(err)
		}
	}
	if content(t, filepath.Join(dir, "real")) != "new" || content(t, filepath.Join(dir, "not-yet")) != "new" {
		t.Error("the target was not written")
	}
	if e, _ := Stat(filepath.Join(dir, "link")); e.Type != "symlink" || e.Target != "real" {
		t.Errorf("the link became %+v", e)
	}
	_, err := Write(filepath.Join(dir, "loop"), Target{}, strings.NewReader("x"))
	want(t, "loop", err, "bad_path")
}

func TestWriteGivesTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	path := filepath.Join(t.TempDir(), "a/b")
	if _, err := Write(path, Target{Owner: &Owner{1234, 5678}, Mode: mode(0o600), Parents: true}, strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, filepath.Dir(path)} {
		if e, _ := Stat(p); e.UID != 1234 || e.GID != 5678 {
			t.Errorf("%+v", e)
		}
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "file"), "text")
	syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600)
	for path, wanted := range map[string]string{
		dir: "is_a_directory", filepath.Join(dir, "none"): "file_not_found", filepath.Join(dir, "file/x"): "not_a_directory",
		filepath.Join(dir, "pipe"): "not_supported", "/dev/zero": "not_supported",
	} {
		_, err := Open(path)
		want(t, path, err, wanted)
	}
	c, err := Open(filepath.Join(dir, "file"))
	if err != nil || c.Size != 4 {
		t.Fatal(err)
	}
	c.Close()
}

func TestListAndStat(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "b"), "12345")
	os.Mkdir(filepath.Join(dir, "a"), 0o700)
	os.Symlink("/nowhere", filepath.Join(dir, "c"))
	syscall.Mkfifo(filepath.Join(dir, "d"), 0o600)
	entries, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, fmt.Sprint(e.Name, "=", e.Type, ",", e.Target))
		if e.Path != filepath.Join(dir, e.Name) {
			t.Errorf("%+v", e)
		}
	}
	if got := strings.Join(all, " "); got != "a=directory, b=file, c=symlink,/nowhere d=other," {
		t.Errorf("got %s", got)
	}
	_, err = List(filepath.Join(dir, "b"))
	want(t, "b", err, "not_a_directory")
	_, err = Stat(filepath.Join(dir, "x"))
	want(t, "x", err, "file_not_found")
	if e, _ := Stat("/"); e.Name != "/" {
		t.Errorf("%+v", e)
	}
}

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "x/y/z")
	want(t, deep, MakeFolder(deep, 0o755, Owner{}), "file_not_found")
	for range 2 { // the second time it exists
		if err := MakeFolders(deep, 0o2750, Owner{}); err != nil {
			t.Fatal(err)
		}
	}
	if e, _ := Stat(deep); e.Mode != "02750" {
		t.Errorf("%+v", e)
	}
	want(t, deep, MakeFolder(deep, 0o755, Owner{}), "file_exists")
	put(t, filepath.Join(dir, "file"), "")
	want(t, "file", MakeFolders(filepath.Join(dir, "file"), 0o755, Owner{}), "not_a_directory")
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	full := filepath.Join(dir, "full")
	os.MkdirAll(filepath.Join(full, "sub"), 0o755)
	outside := filepath.Join(dir, "outside")
	put(t, outside, "x")
	os.Symlink(outside, filepath.Join(full, "link"))
	want(t, full, Remove(full, false), "directory_not_empty")
	want(t, "none", Remove(filepath.Join(dir, "none"), false), "file_not_found")
	want(t, "none", Remove(filepath.Join(dir, "none"), true), "file_not_found")
	want(t, "/", Remove("/", true), "bad_path")
	if err := Remove(full, true); err != nil {
		t.Fatal(err)
	}
	if err := Remove(outside, false); err != nil {
		t.Fatal(err) // the link was removed, not what it leads to
	}
	if names(t, dir) != "" {
		t.Error(names(t, dir))
	}
}

func TestMoveWithinAndAcrossFileSystems(t *testing.T) {
	dir, other := t.TempDir(), "/dev/shm"
	if a, b := device(t, dir), device(t, other); a == b {
		t.Skip("no second file system here")
	}
	other, err := os.MkdirTemp(other, "fused-test")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(other)
	for i, target := range []string{filepath.Join(dir, "moved"), filepath.Join(other, "moved")} {
		from := filepath.Join(dir, fmt.Sprint("tree", i))
		os.MkdirAll(filepath.Join(from, "sub"), 0o750)
		put(t, filepath.Join(from, "sub/file"), "text")
		syscall.Chmod(filepath.Join(from, "sub/file"), 0o4711)
		os.Symlink("sub/file", filepath.Join(from, "link"))
		before, _ := Stat(filepath.Join(from, "sub/file"))
		if err := Move(from, target); err != nil {
			t.Fatal(err)
		}
		after, _ := Stat(filepath.Join(target, "sub/file"))
		if before.Mode != after.Mode || before.MtimeMS != after.MtimeMS || before.UID != after.UID {
			t.Errorf("%+v became %+v", before, after)
		}
		if e, _ := Stat(filepath.Join(target, "link")); e.Target != "sub/file" {
			t.Errorf("%+v", e)
		}
		if _, err := os.Lstat(from); !os.IsNotExist(err) {
			t.Error("the source is still there")
		}
	}
	if names(t, other) != "moved" {
		t.Errorf("left over: %s", names(t, other))
	}
	want(t, "none", Move(filepath.Join(dir, "none"), filepath.Join(dir, "x")), "file_not_found")
	want(t, "onto", Move(filepath.Join(dir, "moved/sub/file"), filepath.Join(dir, "moved")), "file_exists")
}

func device(t *testing.T, path string) uint64 {
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Skip(err)
	}
	return stat.Dev
}
