// Package board holds a number that is another one after every change, and lets
// readers wait for that: what is behind GET /state.
package board

import (
	"context"
	"math/rand/v2"
	"sync"
)

// firstVersions is the range in which counting begins, so that a number noted
// before a machine was booted anew does not come again. JSON keeps it exact.
const firstVersions = 1 << 48

// Board counts changes.
type Board struct {
	mu      sync.Mutex
	version int64
	changed chan struct{} // closed at the next change
}

// New returns a board with a version of its own.
func New() *Board {
	return &Board{version: 1 + rand.Int64N(firstVersions), changed: make(chan struct{})}
}

// Changed is called after every change.
func (b *Board) Changed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.version++
	close(b.changed)
	b.changed = make(chan struct{})
}

// Version is the present number. Read it before what it is about: then a change
// in between is at worst told twice.
func (b *Board) Version() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.version
}

// Wait returns when the version is not the given one, or when ctx ends.
func (b *Board) Wait(ctx context.Context, version int64) {
	for {
		b.mu.Lock()
		current, changed := b.version, b.changed
		b.mu.Unlock()
		if current != version {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
