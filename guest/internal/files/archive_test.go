package files

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var someTime = time.Unix(1_600_000_000, 0)

// pack makes an archive; a body makes a file.
func pack(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		body := h.Uname // carries the content in these tests
		h.Uname = ""
		h.ModTime = someTime
		if h.Mode == 0 {
			h.Mode = 0o640
		}
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	return &buf
}

func file(name, body string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Uname: body}
}
func folder(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o750}
}
func symlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}
func hardlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
}

func TestArchiveRoundTrip(t *testing.T) {
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	os.MkdirAll(filepath.Join(tree, "sub/empty"), 0o755)
	long := strings.Repeat("long-name-", 20)
	put(t, filepath.Join(tree, "sub", long), "content")
	put(t, filepath.Join(tree, "big"), strings.Repeat("0123456789", 100000))
	syscall.Chmod(filepath.Join(tree, "big"), 0o4755)
	os.Link(filepath.Join(tree, "big"), filepath.Join(tree, "same"))
	os.Symlink("/absolute/elsewhere", filepath.Join(tree, "link"))
	os.Chtimes(filepath.Join(tree, "big"), someTime, someTime)
	os.Chtimes(filepath.Join(tree, "sub"), someTime, someTime)
	var packed bytes.Buffer
	if err := Archive(tree, &packed); err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	done, err := Extract(target, Owner{}, &packed)
	if err != nil || done.Entries != 7 || done.Bytes != 1000007 {
		t.Fatalf("%+v %v", done, err)
	}
	if names(t, target) != "tree" || names(t, filepath.Join(target, "tree/sub")) != "empty "+long {
		t.Error("names differ")
	}
	big, _ := Stat(filepath.Join(target, "tree/big"))
	same, _ := Stat(filepath.Join(target, "tree/same"))
	sub, _ := Stat(filepath.Join(target, "tree/sub"))
	if big.Mode != "04755" || big.MtimeMS != someTime.UnixMilli() || big.SizeBytes != same.SizeBytes || sub.MtimeMS != someTime.UnixMilli() {
		t.Errorf("%+v %+v %+v", big, same, sub)
	}
	if link, _ := Stat(filepath.Join(target, "tree/link")); link.Target != "/absolute/elsewhere" {
		t.Errorf("%+v", link)
	}
	// A second time replaces, and through a gzip.
	var again bytes.Buffer
	zip := gzip.NewWriter(&again)
	Archive(tree, zip)
	zip.Close()
	if _, err := Extract(target, Owner{}, &again); err != nil {
		t.Fatal(err)
	}
}

func TestASingleFileIsAnArchive(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "one"), "1")
	var packed bytes.Buffer
	if err := Archive(filepath.Join(dir, "one"), &packed); err != nil {
		t.Fatal(err)
	}
	header, err := tar.NewReader(&packed).Next()
	if err != nil || header.Name != "one" || header.Size != 1 {
		t.Fatalf("%+v %v", header, err)
	}
	want(t, "none", Archive(filepath.Join(dir, "none"), io.Discard), "file_not_found")
}

func TestEntriesThatLeaveTheFolderAreRefused(t *testing.T) {
	outside := t.TempDir()
	put(t, filepath.Join(outside, "victim"), "safe")
	cases := map[string][]tar.Header{
		"absolute":                    {file("/tmp/fused-evil", "x")},
		"dot dot":                     {file("../evil", "x")},
		"dot dot inside":              {folder("a"), file("a/../../evil", "x")},
		"hidden dot dot":              {symlink("a", outside), file("a/../evil", "x")},
		"through an absolute link":    {symlink("out", outside), file("out/evil", "x")},
		"through a relative link":     {symlink("up", "../.."), file("up/evil", "x")},
		"through a chain of links":    {folder("d"), symlink("d/e", ".."), symlink("f", "d/e/.."), file("f/evil", "x")},
		"folder through a link":       {symlink("out", outside), folder("out/evil")},
		"link through a link":         {symlink("out", outside), symlink("out/evil", "x")},
		"hard link to the outside":    {hardlink("evil", filepath.Join(outside, "victim"))},
		"hard link through dot dot":   {hardlink("evil", "../victim")},
		"hard link through a symlink": {symlink("out", outside), hardlink("evil", "out/victim")},
		"the folder itself as a file": {file(".", "x")},
	}
	for name, headers := range cases {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			target := filepath.Join(parent, "target")
			os.Mkdir(target, 0o755)
			_, err := Extract(target, Owner{}, pack(t, headers...))
			want(t, name, err, "bad_path")
			if names(t, outside) != "victim" || names(t, parent) != "target" || content(t, filepath.Join(outside, "victim")) != "safe" {
				t.Errorf("outside: %s, above: %s", names(t, outside), names(t, parent))
			}
		})
	}
}

func TestAFileReplacesALinkInsteadOfWritingThroughIt(t *testing.T) {
	outside, target := t.TempDir(), t.TempDir()
	put(t, filepath.Join(outside, "victim"), "safe")
	os.Symlink(filepath.Join(outside, "victim"), filepath.Join(target, "name"))
	if _, err := Extract(target, Owner{}, pack(t, file("name", "new"))); err != nil {
		t.Fatal(err)
	}
	if content(t, filepath.Join(outside, "victim")) != "safe" || content(t, filepath.Join(target, "name")) != "new" {
		t.Error("written through the link")
	}
	os.Symlink(outside, filepath.Join(target, "folder"))
	_, err := Extract(target, Owner{}, pack(t, folder("folder/"), file("folder/x", "y")))
	want(t, "folder", err, "bad_path")
	if names(t, outside) != "victim" {
		t.Error(names(t, outside))
	}
}

func TestLinksInsideAreFollowed(t *testing.T) {
	target := t.TempDir()
	os.MkdirAll(filepath.Join(target, "usr/lib"), 0o755)
	os.Symlink("usr/lib", filepath.Join(target, "lib"))
	if _, err := Extract(target, Owner{}, pack(t, folder("lib/"), file("lib/x", "y"), file("deep/new/folder/z", "z"))); err != nil {
		t.Fatal(err)
	}
	if content(t, filepath.Join(target, "usr/lib/x")) != "y" || content(t, filepath.Join(target, "deep/new/folder/z")) != "z" {
		t.Error("not there")
	}
	if e, _ := Stat(filepath.Join(target, "lib")); e.Type != "symlink" {
		t.Errorf("%+v", e)
	}
}

func TestArchiveRefusals(t *testing.T) {
	target := t.TempDir()
	os.Mkdir(filepath.Join(target, "folder"), 0o755)
	put(t, filepath.Join(target, "plain"), "")
	_, err := Extract(target, Owner{}, pack(t, file("folder", "x")))
	want(t, "file over folder", err, "is_a_directory")
	_, err = Extract(target, Owner{}, pack(t, file("plain/x", "x")))
	want(t, "below a file", err, "not_a_directory")
	_, err = Extract(target, Owner{}, pack(t, tar.Header{Typeflag: tar.TypeFifo, Name: "pipe"}))
	want(t, "fifo", err, "not_supported")
	_, err = Extract(filepath.Join(target, "none"), Owner{}, pack(t))
	want(t, "no folder", err, "file_not_found")
	_, err = Extract(filepath.Join(target, "plain"), Owner{}, pack(t))
	want(t, "a file as folder", err, "not_a_directory")
	_, err = Extract(target, Owner{}, strings.NewReader("this is no archive, but it is long enough "+strings.Repeat("x", 600)))
	want(t, "nonsense", err, "bad_request")
	whole := pack(t, file("cut", strings.Repeat("y", 5000))).Bytes()
	_, err = Extract(target, Owner{}, bytes.NewReader(whole[:3000]))
	want(t, "cut off", err, "bad_request")
	if strings.Contains(names(t, target), "cut") {
		t.Error("half a file was left")
	}
}

func TestExtractGivesTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	target := t.TempDir()
	if _, err := Extract(target, Owner{77, 88}, pack(t, file("a/b", "x"), symlink("s", "a"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "a/b", "s"} {
		if e, _ := Stat(filepath.Join(target, name)); e.UID != 77 || e.GID != 88 {
			t.Errorf("%+v", e)
		}
	}
}
