package process

import (
	"context"
	"errors"
	"io"
	"sync"
)

// Sizes of the retained output of one stream.
const (
	firstRing = 4 << 10
	RingSize  = 1 << 20
)

// ErrLost says that the asked bytes are no longer retained.
var ErrLost = errors.New("output is no longer retained")

// Ring retains the last bytes of a stream under their absolute offsets.
type Ring struct {
	mu      sync.Mutex
	changed *sync.Cond
	buf     []byte // length is a power of two; byte at offset o is buf[o%len]
	end     int64
	ended   bool
}

// NewRing returns an empty ring that grows when needed.
func NewRing() *Ring {
	r := &Ring{}
	r.changed = sync.NewCond(&r.mu)
	return r
}

// Write appends; the oldest bytes give way.
func (r *Ring) Write(p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.grow(r.end + int64(len(p)))
	if skip := len(p) - len(r.buf); skip > 0 {
		r.end += int64(skip)
		p = p[skip:]
	}
	for len(p) > 0 {
		n := copy(r.buf[r.end%int64(len(r.buf)):], p)
		r.end += int64(n)
		p = p[n:]
	}
	r.changed.Broadcast()
}

// grow doubles the buffer while it holds everything since the beginning.
func (r *Ring) grow(need int64) {
	size := max(len(r.buf), firstRing)
	for int64(size) < need && size < RingSize {
		size *= 2
	}
	if size == len(r.buf) {
		return
	}
	bigger := make([]byte, size)
	copy(bigger, r.buf[:min(r.end, int64(len(r.buf)))])
	r.buf = bigger
}

// Close says that no more will come.
func (r *Ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.changed.Broadcast()
}

// Open takes back Close.
func (r *Ring) Open() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = false
}

// Discard forgets what is retained; the offsets stay.
func (r *Ring) Discard() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buf = nil
}

// Held is the memory that the ring takes.
func (r *Ring) Held() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.buf)
}

// Range returns the offsets of the oldest retained byte and of the end.
func (r *Ring) Range() (start, end int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.start(), r.end
}

func (r *Ring) start() int64 { return max(0, r.end-int64(len(r.buf))) }

// ReadAt copies bytes from an absolute offset. At the end it waits for more, or
// returns io.EOF when there will be none; ErrLost when the ring has moved on.
func (r *Ring) ReadAt(ctx context.Context, p []byte, offset int64) (int, error) {
	stop := context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.changed.Broadcast()
	})
	defer stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for offset >= r.end {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if r.ended {
			return 0, io.EOF
		}
		r.changed.Wait()
	}
	if offset < r.start() {
		return 0, ErrLost
	}
	return r.copyAt(p, offset), nil
}

func (r *Ring) copyAt(p []byte, offset int64) int {
	total := 0
	for total < len(p) && offset < r.end {
		at := offset % int64(len(r.buf))
		upto := min(int64(len(r.buf)), at+r.end-offset)
		n := copy(p[total:], r.buf[at:upto])
		total += n
		offset += int64(n)
	}
	return total
}
