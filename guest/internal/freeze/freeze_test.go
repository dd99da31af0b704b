package freeze

import (
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// kernel stands in for the one that freezes.
type kernel struct {
	mu      sync.Mutex
	frozen  map[string]bool
	said    []string
	refuses string
	thawed  chan string
}

func newKernel() *kernel { return &kernel{frozen: map[string]bool{}, thawed: make(chan string, 8)} }

func (k *kernel) act(path string, request uintptr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	freezes := request == fiFreeze
	k.said = append(k.said, fmt.Sprintf("%s %v", path, freezes))
	if freezes && path == k.refuses {
		return syscall.EOPNOTSUPP
	}
	if k.frozen[path] == freezes {
		return syscall.EINVAL
	}
	k.frozen[path] = freezes
	if !freezes {
		k.thawed <- path
	}
	return nil
}

func (k *kernel) freezer(paths ...string) *Freezer {
	f := New(paths)
	f.act, f.sync = k.act, func() { k.said = append(k.said, "sync") }
	return f
}

func TestFrozenUntilThawed(t *testing.T) {
	k := newKernel()
	f := k.freezer("/a", "/b")
	if err := f.Freeze(time.Hour); err != nil {
		t.Fatal(err)
	}
	if !f.Thaw() {
		t.Error("it was held until now")
	}
	if f.Thaw() {
		t.Error("it was thawed already")
	}
	want := []string{"sync", "/a true", "/b true", "/b false", "/a false"}
	if !slices.Equal(k.said, want) {
		t.Errorf("did %v, want %v", k.said, want)
	}
}

func TestAHostThatDiesLeavesNothingFrozen(t *testing.T) {
	k := newKernel()
	f := k.freezer("/a")
	if err := f.Freeze(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	<-k.thawed
	if f.Thaw() {
		t.Error("the host must learn that the limit was over")
	}
}

func TestAnOldLimitEndsNoNewFreeze(t *testing.T) {
	k := newKernel()
	f := k.freezer("/a")
	if err := f.Freeze(time.Hour); err != nil {
		t.Fatal(err)
	}
	old := f.turn
	f.Thaw()
	if err := f.Freeze(time.Hour); err != nil {
		t.Fatal(err)
	}
	f.expire(old)
	if !f.Thaw() {
		t.Error("the first freeze's limit ended the second")
	}
}

func TestASecondFreezeBeginsTheLimitAnew(t *testing.T) {
	k := newKernel()
	f := k.freezer("/a")
	for range 2 {
		if err := f.Freeze(time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if !f.Thaw() || len(k.said) != 3 {
		t.Errorf("did %v", k.said)
	}
}

func TestAllOrNothing(t *testing.T) {
	k := newKernel()
	k.refuses = "/b"
	f := k.freezer("/a", "/b")
	if f.Freeze(time.Hour) == nil {
		t.Error("it must fail")
	}
	if k.frozen["/a"] || f.Thaw() {
		t.Error("the first one stays frozen")
	}
	if New(nil).Freeze(time.Hour) == nil {
		t.Error("there is nothing to freeze")
	}
}

func TestAGuestThatThawsByItselfIsNoticed(t *testing.T) {
	k := newKernel()
	f := k.freezer("/a")
	if err := f.Freeze(time.Hour); err != nil {
		t.Fatal(err)
	}
	k.frozen["/a"] = false
	if f.Thaw() {
		t.Error("it was not held until now")
	}
}

func TestOnlyAMountedFileSystemFreezes(t *testing.T) {
	if New([]string{"/proc"}).Freeze(time.Hour) == nil {
		t.Error("proc cannot be frozen")
	}
	if New([]string{"/no/such/folder"}).Freeze(time.Hour) == nil {
		t.Error("what is not there cannot be frozen")
	}
}
