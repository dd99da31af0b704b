package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"sync"
)

// Limits of section 1.1.
const (
	InitialCredit = 262144
	MaxStreams    = 1024
	// maxCredit bounds what a peer may grant: more is a broken peer.
	maxCredit = 1 << 30
	// returnAfter is the consumed part of the window after which it is given
	// back: a quarter keeps a bulk sender from ever running dry.
	returnAfter = InitialCredit / 4
)

// Port is the byte channel below a session. Read blocks until there are bytes
// and returns ErrNoHost when the peer has gone; a later Read waits for the next
// peer. Write blocks until all bytes are written. Close ends both.
type Port interface {
	io.ReadWriteCloser
}

// ErrNoHost is what a Port's Read returns once when its peer has disconnected.
var ErrNoHost = errors.New("mux: no host is connected")

// Session is the guest's side of the multiplexer. It is a net.Listener whose
// connections are the streams that the host opens.
type Session struct {
	port Port

	mu       sync.Mutex
	acceptOK *sync.Cond
	writeOK  *sync.Cond
	streams  map[uint32]*Stream
	lastID   uint32
	backlog  []*Stream
	closed   error

	hello  []byte    // epoch to echo before anything else
	resets []uint32  // RESET answers for streams that are not in the table
	ready  []*Stream // streams with something to send, in turn
}

// NewSession starts a session on a port and owns the port from then on.
func NewSession(port Port) *Session {
	s := &Session{port: port, streams: map[uint32]*Stream{}}
	s.acceptOK = sync.NewCond(&s.mu)
	s.writeOK = sync.NewCond(&s.mu)
	go s.guard(s.readLoop)
	go s.guard(s.writeLoop)
	return s
}

// guard turns a panic into the end of the session: in PID 1 the alternative is
// a kernel panic.
func (s *Session) guard(loop func()) {
	defer func() {
		if cause := recover(); cause != nil {
			s.fail(fmt.Errorf("mux: panic: %v\n%s", cause, debug.Stack()))
		}
	}()
	loop()
}

// Accept returns the next stream that the host opened.
func (s *Session) Accept() (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.closed != nil {
			return nil, s.closed
		}
		if len(s.backlog) > 0 {
			stream := s.backlog[0]
			s.backlog = s.backlog[1:]
			return stream, nil
		}
		s.acceptOK.Wait()
	}
}

// Close ends the session and its port.
func (s *Session) Close() error {
	s.fail(net.ErrClosed)
	return s.port.Close()
}

// Addr names the channel; streams have no addresses of their own.
func (s *Session) Addr() net.Addr { return Addr{} }

// Streams returns the number of streams in use.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

func (s *Session) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed == nil {
		s.closed = err
	}
	s.dropAll()
	s.acceptOK.Broadcast()
	s.writeOK.Broadcast()
}

func (s *Session) readLoop() {
	decoder := NewDecoder()
	for {
		n, err := s.port.Read(decoder.Space())
		decoder.Advance(n)
		s.handleAll(decoder)
		switch {
		case errors.Is(err, ErrNoHost):
			// Nothing may be concluded: the kernel reports a hang-up out of
			// band, possibly after the first bytes of the next host. The
			// streams end with the HELLO of whoever connects next.
		case err != nil:
			s.fail(err)
			return
		}
	}
}

func (s *Session) handleAll(decoder *Decoder) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		frame, ok := decoder.Next()
		if !ok {
			return
		}
		s.handle(frame)
	}
}

// handle acts on one valid frame. The lock is held.
func (s *Session) handle(f Frame) {
	switch f.Type {
	case Hello:
		s.dropAll()
		s.hello = append([]byte(nil), f.Payload...)
		s.writeOK.Signal()
	case Open:
		s.open(f.Stream)
	default:
		stream := s.streams[f.Stream]
		if stream != nil {
			stream.handle(f)
		} else if f.Type == Data {
			s.refuse(f.Stream)
		}
	}
}

func (s *Session) open(id uint32) {
	// An id that was used already belongs to a stream that may still be in
	// the host's table: answering RESET is the only safe thing.
	if id <= s.lastID || len(s.streams) >= MaxStreams {
		s.lastID = max(s.lastID, id)
		s.refuse(id)
		return
	}
	s.lastID = id
	stream := newStream(s, id)
	s.streams[id] = stream
	s.backlog = append(s.backlog, stream)
	s.acceptOK.Signal()
}

// refuse queues a RESET for a stream that has no entry. A peer that floods
// unknown streams gets at most one answer per queue slot.
func (s *Session) refuse(id uint32) {
	n := len(s.resets)
	if n >= MaxStreams || (n > 0 && s.resets[n-1] == id) {
		return
	}
	s.resets = append(s.resets, id)
	s.writeOK.Signal()
}

// dropAll forgets every stream and all queued output: an epoch has ended.
func (s *Session) dropAll() {
	for _, stream := range s.streams {
		stream.drop()
	}
	s.lastID = 0
	s.hello, s.resets, s.ready, s.backlog = nil, nil, nil, nil
}

// Addr is the address of both ends of every stream.
type Addr struct{}

// Network implements net.Addr.
func (Addr) Network() string { return "virtio" }

func (Addr) String() string { return "fuse.agent" }

func windowIncrement(payload []byte) int64 { return int64(binary.BigEndian.Uint32(payload)) }
