package mux

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// ErrReset is what readers and writers of a stream see that is gone.
var ErrReset error = &net.OpError{Op: "mux", Net: "virtio", Err: syscall.ECONNRESET}

// Stream is one connection. All fields are guarded by the session's lock.
type Stream struct {
	session *Session
	id      uint32
	gone    context.Context // ends when the stream was reset
	reset   context.CancelCauseFunc

	writing sync.Mutex // one Write at a time; taken before the session's lock

	readOK  *sync.Cond
	writeOK *sync.Cond
	readBy  deadline
	writeBy deadline

	received ring
	window   int  // what the peer may still send
	owed     int  // consumed by the application, not yet returned to the peer
	peerDone bool // the peer sent CLOSE
	err      error

	out       []byte // the rest of the Write in progress
	credit    int64  // what we may still send
	closed    bool   // Close was called
	noMore    bool   // no more Writes will come
	closeSent bool
	abort     bool // RESET has to be sent
	queued    bool // is in session.ready
	detached  bool // is no longer in the table: must not send anything
}

func newStream(s *Session, id uint32) *Stream {
	st := &Stream{session: s, id: id, window: InitialCredit, credit: InitialCredit}
	st.readOK = sync.NewCond(&s.mu)
	st.writeOK = sync.NewCond(&s.mu)
	st.gone, st.reset = context.WithCancelCause(context.Background())
	return st
}

// Gone ends when the peer or the channel has dropped the stream. It does not
// end on an orderly half-close.
func (st *Stream) Gone() context.Context { return st.gone }

// handle acts on a frame for this stream. The session's lock is held.
func (st *Stream) handle(f Frame) {
	switch f.Type {
	case Data:
		st.receive(f.Payload)
	case Window:
		st.credit += windowIncrement(f.Payload)
		if st.credit > maxCredit {
			st.sendReset()
		}
		st.queue()
	case Close:
		st.peerDone = true
		st.readOK.Broadcast()
		st.forgetIfDone()
	case Reset:
		st.drop()
	}
}

func (st *Stream) receive(payload []byte) {
	// Beyond the credit, after CLOSE, or with nobody left to read it: the peer
	// must stop.
	if len(payload) > st.window || st.peerDone || st.closed {
		st.sendReset()
		return
	}
	st.window -= len(payload)
	st.received.write(payload)
	st.readOK.Broadcast()
}

// sendReset makes the stream unusable now and tells the peer in its turn.
func (st *Stream) sendReset() {
	st.abort = true
	st.fail(ErrReset)
	st.queue()
}

// fail wakes everybody who waits on the stream.
func (st *Stream) fail(err error) {
	if st.err == nil {
		st.err = err
	}
	st.out = nil
	st.received = ring{}
	st.readBy.stop()
	st.writeBy.stop()
	st.readOK.Broadcast()
	st.writeOK.Broadcast()
	st.reset(err)
}

// drop ends the stream without a word to the peer: it knows.
func (st *Stream) drop() {
	st.detach()
	st.fail(ErrReset)
}

// detach takes the stream out of the table. Its id may be reused in the next
// epoch, so from here on it must stay silent.
func (st *Stream) detach() {
	delete(st.session.streams, st.id)
	st.detached = true
}

// queue puts the stream at the end of the writer's turns.
func (st *Stream) queue() {
	if st.queued || st.detached || !st.hasWork() {
		return
	}
	st.queued = true
	st.session.ready = append(st.session.ready, st)
	st.session.writeOK.Signal()
}

func (st *Stream) hasWork() bool {
	return st.abort || st.owesWindow() || (len(st.out) > 0 && st.credit > 0) || st.owesClose()
}

func (st *Stream) owesWindow() bool {
	return st.owed >= returnAfter && st.err == nil && !st.peerDone && !st.closed
}

func (st *Stream) owesClose() bool {
	return st.noMore && !st.closeSent && st.err == nil && len(st.out) == 0
}

func (st *Stream) forgetIfDone() {
	if st.closeSent && st.peerDone {
		st.detach()
	}
}

// Read implements net.Conn.
func (st *Stream) Read(p []byte) (int, error) {
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case st.closed:
			return 0, net.ErrClosed
		case st.err != nil:
			return 0, st.err
		case st.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case st.received.len() > 0:
			n := st.received.read(p)
			st.owed += n
			st.queue()
			return n, nil
		case st.peerDone:
			return 0, io.EOF
		}
		st.readOK.Wait()
	}
}

// Write implements net.Conn. It returns when the writer has taken all bytes.
func (st *Stream) Write(p []byte) (int, error) {
	st.writing.Lock()
	defer st.writing.Unlock()
	s := st.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := st.writeError(); err != nil || len(p) == 0 {
		return 0, err
	}
	st.out = p
	st.queue()
	var err error
	for len(st.out) > 0 && err == nil {
		st.writeOK.Wait()
		err = st.writeError()
	}
	rest := st.out
	st.out = nil
	switch {
	case rest == nil: // taken away by Close or by a reset
		return 0, err
	case len(rest) == 0:
		return len(p), nil
	}
	return len(p) - len(rest), err
}

func (st *Stream) writeError() error {
	switch {
	case st.closed || st.noMore:
		return net.ErrClosed
	case st.err != nil:
		return st.err
	case st.writeBy.passed():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite half-closes the stream: the peer sees the end, and may go on sending.
func (st *Stream) CloseWrite() error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if err := st.writeError(); err != nil {
		return err
	}
	st.noMore = true
	st.queue()
	return nil
}

// Close implements net.Conn. What was written still goes out, then CLOSE.
// Bytes that nobody will read any more are answered by RESET, as TCP does.
func (st *Stream) Close() error {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if st.closed {
		return net.ErrClosed
	}
	st.out = nil
	st.closed, st.noMore = true, true
	st.readBy.stop()
	st.writeBy.stop()
	st.readOK.Broadcast()
	st.writeOK.Broadcast()
	if st.err == nil && st.received.len() > 0 && !st.peerDone {
		st.abort = true
	}
	st.received = ring{}
	st.queue()
	return nil
}

// Abort resets the stream: the peer sees a broken connection, never an
// orderly end.
func (st *Stream) Abort() {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	if st.err == nil {
		st.sendReset()
	}
}

// LocalAddr implements net.Conn.
func (st *Stream) LocalAddr() net.Addr { return Addr{} }

// RemoteAddr implements net.Conn.
func (st *Stream) RemoteAddr() net.Addr { return Addr{} }

// SetDeadline implements net.Conn.
func (st *Stream) SetDeadline(t time.Time) error {
	st.setDeadline(&st.readBy, st.readOK, t)
	st.setDeadline(&st.writeBy, st.writeOK, t)
	return nil
}

// SetReadDeadline implements net.Conn.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.setDeadline(&st.readBy, st.readOK, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.setDeadline(&st.writeBy, st.writeOK, t)
	return nil
}

func (st *Stream) setDeadline(d *deadline, waiters *sync.Cond, t time.Time) {
	st.session.mu.Lock()
	defer st.session.mu.Unlock()
	d.stop()
	d.at = t
	if t.IsZero() || st.closed || st.err != nil {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		waiters.Broadcast()
		return
	}
	d.timer = time.AfterFunc(wait, func() {
		st.session.mu.Lock()
		defer st.session.mu.Unlock()
		waiters.Broadcast()
	})
}

// deadline is a moment after which waiting ends. The zero value never passes.
type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
