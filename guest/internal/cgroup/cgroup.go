// Package cgroup gives every command its own cgroup, which is the only way to
// end a process tree for certain. Kernels without cgroup2 are served without.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Tree is the folder below which commands get their groups.
type Tree struct {
	root string

	mu    sync.Mutex
	next  int
	stale []string // groups of ended commands that still hold background work
}

// Open makes the folder; it fails, and leaves none, where cgroup2 is not mounted above it.
func Open(root string) (*Tree, error) {
	made := os.Mkdir(root, 0o755)
	if made != nil && !errors.Is(made, os.ErrExist) {
		return nil, made
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.kill")); err != nil {
		if made == nil {
			os.Remove(root)
		}
		return nil, fmt.Errorf("cgroup2 with cgroup.kill is needed: %w", err)
	}
	return &Tree{root: root}, nil
}

// Group is the cgroup of one command. A nil *Group stands for "none".
type Group struct {
	tree *Tree
	path string
	dir  *os.File
}

// New makes an empty group; nil without error on a nil tree.
func (t *Tree) New() (*Group, error) {
	if t == nil {
		return nil, nil
	}
	t.mu.Lock()
	t.next++
	path := filepath.Join(t.root, "c"+strconv.Itoa(t.next))
	t.mu.Unlock()
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		os.Remove(path)
		return nil, err
	}
	return &Group{tree: t, path: path, dir: dir}, nil
}

// Attach makes the next fork with attr start inside the group.
func (g *Group) Attach(attr *syscall.SysProcAttr) {
	if g != nil {
		attr.UseCgroupFD, attr.CgroupFD = true, int(g.dir.Fd())
	}
}

// Forked lets go of the descriptor that only the fork needed.
func (g *Group) Forked() {
	if g != nil {
		g.dir.Close()
	}
}

// Kill ends every process in the group. A group that is gone has none.
func (g *Group) Kill() {
	file, err := os.OpenFile(filepath.Join(g.path, "cgroup.kill"), os.O_WRONLY, 0)
	if err == nil {
		file.WriteString("1")
		file.Close()
	}
}

// Processes returns the numbers of the processes in the group.
func (g *Group) Processes() []int {
	if g == nil {
		return nil
	}
	text, _ := os.ReadFile(filepath.Join(g.path, "cgroup.procs"))
	var pids []int
	for line := range strings.Lines(string(text)) {
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Release removes the group, now or when its last process has ended.
func (g *Group) Release() {
	if g == nil {
		return
	}
	if os.Remove(g.path) != nil {
		g.tree.mu.Lock()
		g.tree.stale = append(g.tree.stale, g.path)
		g.tree.mu.Unlock()
	}
	g.tree.Sweep()
}

// Sweep removes groups whose background work has ended meanwhile.
func (t *Tree) Sweep() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	left := t.stale[:0]
	for _, path := range t.stale {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			left = append(left, path)
		}
	}
	t.stale = left
}
