package reap

import (
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 20 * time.Second

func shell(script string) func() (int, error) {
	return func() (int, error) {
		return syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{})
	}
}

func await(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("it did not end")
	}
}

func TestEveryStatusReachesItsWaiter(t *testing.T) {
	r := New(false, nil)
	defer r.Stop()
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			child, err := r.Start(shell("exit " + strconv.Itoa(i)))
			if err != nil {
				t.Error(err)
				return
			}
			await(t, child.Done())
			if got := child.Status().ExitStatus(); got != i {
				t.Errorf("exit status %d, want %d", got, i)
			}
		})
	}
	group.Wait()
}

func TestItLeavesOtherChildrenAlone(t *testing.T) {
	r := New(false, nil)
	defer r.Stop()
	foreign := exec.Command("/bin/sh", "-c", "exit 9")
	if err := foreign.Start(); err != nil {
		t.Fatal(err)
	}
	child, err := r.Start(shell("sleep 0.05"))
	if err != nil {
		t.Fatal(err)
	}
	await(t, child.Done())
	foreign.Wait()
	if code := foreign.ProcessState.ExitCode(); code != 9 {
		t.Fatalf("the other child's status became %d", code)
	}
}

func TestAnEndedProcessGetsNoSignals(t *testing.T) {
	r := New(false, nil)
	defer r.Stop()
	child, err := r.Start(shell("exit 0"))
	if err != nil {
		t.Fatal(err)
	}
	await(t, child.Done())
	if err := child.Signal(syscall.SIGTERM, true); err != syscall.ESRCH {
		t.Fatalf("got %v", err)
	}
}

func TestAFailedForkLeavesNothing(t *testing.T) {
	r := New(false, nil)
	defer r.Stop()
	_, err := r.Start(func() (int, error) {
		return syscall.ForkExec("/no/such/program", []string{"x"}, &syscall.ProcAttr{})
	})
	if err != syscall.ENOENT || len(r.children) != 0 {
		t.Fatalf("%v, %d children", err, len(r.children))
	}
}

func TestOrphansAreReaped(t *testing.T) {
	const prSetChildSubreaper = 36
	adopt := func(on uintptr) {
		if _, _, errno := syscall.Syscall(syscall.SYS_PRCTL, prSetChildSubreaper, on, 0); errno != 0 {
			t.Skip("cannot adopt orphans here: ", errno)
		}
	}
	adopt(1)
	defer adopt(0)
	orphans := make(chan struct{}, 10)
	r := New(true, func() { orphans <- struct{}{} })
	defer r.Stop()
	// The shell ends at once; its child becomes ours and ends a moment later.
	child, err := r.Start(shell("sleep 0.1 & exit 4"))
	if err != nil {
		t.Fatal(err)
	}
	await(t, child.Done())
	if child.Status().ExitStatus() != 4 {
		t.Fatal("wrong status")
	}
	select {
	case <-orphans:
	case <-time.After(patience):
		t.Fatal("the orphan was not reaped")
	}
	if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); err != syscall.ECHILD {
		t.Fatalf("a child is left: %d, %v", pid, err)
	}
}
