package account

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"fused/internal/fault"
)

const passwd = `# comment
root:x:0:0:root:/root:/bin/bash
broken line
app:x:1000:1001:App,,,:/home/app:/bin/sh
nohome:x:1002:1002:::
bad:x:notanumber:0::/:/bin/sh
dup:x:1000:5:::/dup
`

const group = `root:x:0:
app:x:1001:
docker:x:999:other,app
video:x:44:app
notmine:x:45:application
`

func database(t *testing.T) Database {
	t.Helper()
	dir := t.TempDir()
	d := Database{filepath.Join(dir, "passwd"), filepath.Join(dir, "group")}
	os.WriteFile(d.Passwd, []byte(passwd), 0o644)
	os.WriteFile(d.Group, []byte(group), 0o644)
	return d
}

func TestFind(t *testing.T) {
	d := database(t)
	empty := Database{"/no/passwd", "/no/group"}
	cases := []struct {
		d        Database
		spec     string
		uid, gid uint32
		groups   []uint32
		name     string
		home     string
	}{
		{d, "root", 0, 0, []uint32{0}, "root", "/root"},
		{d, "", 0, 0, []uint32{0}, "root", "/root"},
		{d, "app", 1000, 1001, []uint32{1001, 999, 44}, "app", "/home/app"},
		{d, "1000", 1000, 1001, []uint32{1001, 999, 44}, "app", "/home/app"},
		{d, "app:video", 1000, 44, []uint32{44}, "app", "/home/app"},
		{d, "app:77", 1000, 77, []uint32{77}, "app", "/home/app"},
		{d, "nohome", 1002, 1002, []uint32{1002}, "nohome", "/"},
		{d, "4242", 4242, 0, []uint32{0}, "4242", "/"},
		{empty, "1000:1000", 1000, 1000, []uint32{1000}, "1000", "/"},
		{empty, "1000", 1000, 0, []uint32{0}, "1000", "/"},
	}
	for _, c := range cases {
		u, err := c.d.Find(c.spec)
		if err != nil || u.UID != c.uid || u.GID != c.gid || !slices.Equal(u.Groups, c.groups) || u.Name != c.name || u.Home != c.home {
			t.Errorf("%q: %+v %v", c.spec, u, err)
		}
	}
	if u, err := empty.Find("root"); err != nil || u.UID != 0 {
		t.Errorf("root needs no file: %v", err)
	}
}

func TestUnknownUsers(t *testing.T) {
	d := database(t)
	for _, spec := range []string{"nobody", "bad", "-1", "4294967295", "99999999999", ":", "app:nogroup", "app:", "APP"} {
		_, err := d.Find(spec)
		var f *fault.Fault
		if !errors.As(err, &f) || f.Reason != "unknown_user" || f.Details["user"] != spec {
			t.Errorf("%q: %v", spec, err)
		}
	}
}
