package mux

// ring is a byte queue that grows by doubling up to the stream's window, so
// that an idle stream holds next to nothing and a bulk one never allocates.
type ring struct {
	buf   []byte
	start int
	size  int
}

const firstRing = 4096

func (r *ring) len() int { return r.size }

func (r *ring) write(p []byte) {
	if len(p) == 0 {
		return
	}
	if r.size+len(p) > len(r.buf) {
		r.grow(r.size + len(p))
	}
	at := (r.start + r.size) % len(r.buf)
	n := copy(r.buf[at:], p)
	copy(r.buf, p[n:])
	r.size += len(p)
}

func (r *ring) grow(need int) {
	size := max(len(r.buf), firstRing)
	for size < need {
		size *= 2
	}
	bigger := make([]byte, size)
	n := r.peek(bigger)
	r.buf, r.start, r.size = bigger, 0, n
}

func (r *ring) peek(p []byte) int {
	first := r.buf[r.start:min(r.start+r.size, len(r.buf))]
	n := copy(p, first)
	return n + copy(p[n:], r.buf[:r.size-len(first)])
}

func (r *ring) read(p []byte) int {
	n := r.peek(p[:min(len(p), r.size)])
	r.size -= n
	r.start += n
	if r.start >= len(r.buf) {
		r.start -= len(r.buf)
	}
	if r.size == 0 {
		r.start = 0
	}
	return n
}
