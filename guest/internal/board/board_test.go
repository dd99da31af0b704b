package board

import (
	"context"
	"testing"
)

func TestWaitReturnsAtOnceForAnotherVersion(t *testing.T) {
	b := New()
	b.Wait(context.Background(), b.Version()+1)
	b.Wait(context.Background(), b.Version()-1)
}

func TestWaitReturnsAtAChange(t *testing.T) {
	b := New()
	version, done := b.Version(), make(chan struct{})
	for range 3 {
		go func() { b.Wait(context.Background(), version); done <- struct{}{} }()
	}
	b.Changed()
	for range 3 {
		<-done
	}
	if b.Version() == version {
		t.Error("the version is the same")
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	b := New()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	b.Wait(ctx, b.Version())
}

func TestVersionsOfTwoBootsDiffer(t *testing.T) {
	if New().Version() == New().Version() {
		t.Error("the same")
	}
}
