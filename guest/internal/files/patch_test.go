package files

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestAWriteInPlaceKeepsTheRestAndTheMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	put(t, path, "0123456789")
	os.Chmod(path, 0o640)
	done, err := WriteAt(path, 3, Target{}, strings.NewReader("abc"))
	if err != nil || done.SizeBytes != 10 || content(t, path) != "012abc6789" {
		t.Fatal(done, err, content(t, path))
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o640 {
		t.Error(info.Mode())
	}
}

func TestAHugeOffsetTakesNoRoom(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "file")
	done, err := WriteAt(path, 1<<40, Target{Parents: true}, strings.NewReader("end"))
	if err != nil || done.SizeBytes != 1<<40+3 {
		t.Fatal(done, err)
	}
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil || stat.Blocks*512 > 1<<20 || stat.Mode&0o777 != 0o644 {
		t.Errorf("%+v %v", stat, err)
	}
}

func TestOnlyFilesAreWrittenInPlace(t *testing.T) {
	dir := t.TempDir()
	_, err := WriteAt(dir, 0, Target{}, strings.NewReader("x"))
	want(t, dir, err, "is_a_directory")
	pipe := filepath.Join(dir, "pipe")
	syscall.Mkfifo(pipe, 0o600)
	if _, err = WriteAt(pipe, 0, Target{}, strings.NewReader("x")); err == nil {
		t.Error("a pipe has no places")
	}
}

func search(t *testing.T, path string, query Query) Found {
	t.Helper()
	found, err := Grep(context.Background(), path, query)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestGrepTellsTheFirstMatchOfEachLine(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "a"), "one two two\r\nthree\nTWO")
	os.MkdirAll(filepath.Join(dir, "sub"), 0o755)
	put(t, filepath.Join(dir, "sub/b"), "a.c\nabc\n")
	put(t, filepath.Join(dir, "binary"), "two\x00two\n")
	os.Symlink("a", filepath.Join(dir, "link"))
	found := search(t, dir, Query{Pattern: "two"})
	if len(found.Matches) != 1 || found.Matches[0] != (Match{filepath.Join(dir, "a"), 1, "two"}) || found.Truncated {
		t.Errorf("%+v", found)
	}
	if found = search(t, dir, Query{Pattern: "two", CaseInsensitive: true}); len(found.Matches) != 2 || found.Matches[1].Line != 3 {
		t.Errorf("%+v", found)
	}
	if found = search(t, dir, Query{Pattern: "a.c"}); len(found.Matches) != 1 || found.Matches[0].Match != "a.c" {
		t.Errorf("%+v", found)
	}
	if found = search(t, filepath.Join(dir, "sub/b"), Query{Pattern: "a.c", Regex: true}); len(found.Matches) != 2 {
		t.Errorf("%+v", found)
	}
	if found = search(t, dir, Query{Pattern: "nothing"}); found.Matches == nil || len(found.Matches) != 0 {
		t.Errorf("%+v", found)
	}
}

func TestGrepIsBounded(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "many"), strings.Repeat("x\n", 100))
	if found := search(t, dir, Query{Pattern: "x", MaxMatches: 7}); len(found.Matches) != 7 || !found.Truncated {
		t.Errorf("%d", len(found.Matches))
	}
	put(t, filepath.Join(dir, "many"), strings.Repeat("y", 3<<20)+"\nx\n")
	found := search(t, dir, Query{Pattern: "y+|x", Regex: true})
	if len(found.Matches) != 2 || len(found.Matches[0].Match) != 4<<10 || found.Matches[1].Line != 2 {
		t.Errorf("%d", len(found.Matches))
	}
	for _, bad := range []Query{{}, {Pattern: "(", Regex: true}, {Pattern: "x", MaxMatches: -1}, {Pattern: strings.Repeat("x", 5000)}} {
		_, err := Grep(context.Background(), dir, bad)
		want(t, dir, err, "bad_request")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Grep(ctx, dir, Query{Pattern: "x"}); err == nil {
		t.Error("it went on")
	}
}
