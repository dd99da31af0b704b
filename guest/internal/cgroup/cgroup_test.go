package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

func tree(t *testing.T) *Tree {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		path := filepath.Join(root, "fused-cgroup-test-"+strconv.Itoa(os.Getpid()))
		if tr, err := Open(path); err == nil {
			t.Cleanup(func() {
				if err := os.Remove(path); err != nil {
					t.Error(err)
				}
			})
			return tr
		}
	}
	t.Skip("no cgroup2 here")
	return nil
}

func TestAGroupHoldsWhatIsStartedInIt(t *testing.T) {
	tr := tree(t)
	g, err := tr.New()
	if err != nil {
		t.Fatal(err)
	}
	// The child leaves its session; the group knows it all the same.
	command := exec.Command("/bin/sh", "-c", "setsid sleep 300 & exec sleep 300")
	command.SysProcAttr = &syscall.SysProcAttr{}
	g.Attach(command.SysProcAttr)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	g.Forked()
	for len(g.Processes()) != 2 {
		time.Sleep(time.Millisecond)
	}
	g.Release() // in use: later
	tr.Sweep()
	if len(tr.stale) != 1 {
		t.Fatal("a group in use was forgotten")
	}
	g.Kill()
	command.Wait()
	for until := time.Now().Add(20 * time.Second); len(tr.stale) > 0 && time.Now().Before(until); time.Sleep(time.Millisecond) {
		tr.Sweep()
	}
	if len(tr.stale) != 0 {
		t.Fatal("the group is still there")
	}
	g.Kill() // nothing happens
}

func TestWithoutATreeThereIsNoGroup(t *testing.T) {
	var none *Tree
	g, err := none.New()
	if g != nil || err != nil {
		t.Fatal(g, err)
	}
	g.Attach(&syscall.SysProcAttr{})
	g.Forked()
	g.Release()
	none.Sweep()
	if g.Processes() != nil {
		t.Fatal("processes")
	}
	if _, err := Open(filepath.Join(t.TempDir(), "x")); err == nil {
		t.Fatal("an ordinary folder is no cgroup")
	}
}

func TestAFolderThatIsNoGroupIsNotLeft(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none")
	if tr, err := Open(path); err == nil || tr != nil {
		t.Fatal(tr, err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Fatal("a folder is left", err)
	}
}
