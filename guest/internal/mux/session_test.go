package mux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// testHost is the host's end of a session, frame by frame.
type testHost struct {
	t    *testing.T
	conn net.Conn
	dec  *Decoder
}

// newPair returns a session and its host over a socket pair.
func newPair(t *testing.T) (*Session, *testHost) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	// A small buffer, as a virtqueue is: what waits, waits in the session.
	syscall.SetsockoptInt(fds[0], syscall.SOL_SOCKET, syscall.SO_SNDBUF, 32768)
	guest, host := fileConn(t, fds[0]), fileConn(t, fds[1])
	session := NewSession(guest)
	t.Cleanup(func() { session.Close(); host.Close() })
	return session, &testHost{t: t, conn: host, dec: NewDecoder()}
}

func fileConn(t *testing.T, fd int) net.Conn {
	file := os.NewFile(uintptr(fd), "pair")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func (h *testHost) send(frames ...Frame) {
	h.t.Helper()
	var out []byte
	for _, f := range frames {
		out = Append(out, f)
	}
	h.raw(out)
}

func (h *testHost) raw(b []byte) {
	h.t.Helper()
	h.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := h.conn.Write(b); err != nil {
		h.t.Fatal(err)
	}
}

// next returns the next frame of the guest.
func (h *testHost) next() Frame {
	h.t.Helper()
	f, err := h.nextWithin(patience)
	if err != nil {
		h.t.Fatal("no frame came: ", err)
	}
	return f
}

func (h *testHost) nextWithin(limit time.Duration) (Frame, error) {
	h.conn.SetReadDeadline(time.Now().Add(limit))
	for {
		if f, ok := h.dec.Next(); ok {
			f.Payload = bytes.Clone(f.Payload)
			return f, nil
		}
		n, err := h.conn.Read(h.dec.Space())
		if err != nil {
			return Frame{}, err
		}
		h.dec.Advance(n)
	}
}

func (h *testHost) expect(kind Type, stream uint32) Frame {
	h.t.Helper()
	f := h.next()
	if f.Type != kind || f.Stream != stream {
		h.t.Fatalf("got %s on %d, want %s on %d", typeNames[f.Type], f.Stream, typeNames[kind], stream)
	}
	return f
}

// connect does what a host does on connecting.
func (h *testHost) connect(e byte) {
	h.t.Helper()
	h.raw(make([]byte, MaxFrame))
	h.raw(hello(e))
	for {
		f := h.next()
		if f.Type == Hello && bytes.Equal(f.Payload, epoch(e)) {
			return
		}
	}
}

func accept(t *testing.T, s *Session) *Stream {
	t.Helper()
	conn, err := s.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return conn.(*Stream)
}

func grant(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func TestAStreamCarriesBytesBothWaysAndHalfCloses(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil}, Frame{Data, 1, []byte("ping")}, Frame{Close, 1, nil})
	st := accept(t, s)
	got, err := io.ReadAll(st)
	if string(got) != "ping" || err != nil {
		t.Fatalf("read %q, %v", got, err)
	}
	if _, err := st.Write([]byte("pong")); err != nil {
		t.Fatal(err)
	}
	if f := h.expect(Data, 1); string(f.Payload) != "pong" {
		t.Fatalf("got %q", f.Payload)
	}
	st.Close()
	h.expect(Close, 1)
	if n := s.Streams(); n != 0 {
		t.Fatalf("%d streams left", n)
	}
}

func TestAHelloEndsEveryStreamOfTheEpochBefore(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil}, Frame{Data, 1, []byte("x")}, Frame{Open, 2, nil})
	first, second := accept(t, s), accept(t, s)
	failed := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(second)
		failed <- err
	}()
	h.connect(2)
	if err := <-failed; !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("a blocked reader saw %v", err)
	}
	if _, err := first.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("a later reader saw %v", err)
	}
	if _, err := first.Write([]byte("late")); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("a writer saw %v", err)
	}
	<-first.Gone().Done()
	first.Close()
	first.Abort()
	// Ids and credit start anew, and nothing of the old epoch comes through.
	h.send(Frame{Open, 1, nil}, Frame{Data, 1, make([]byte, MaxPayload)})
	again := accept(t, s)
	go again.Write(make([]byte, InitialCredit))
	for total := 0; total < InitialCredit; {
		total += len(h.expect(Data, 1).Payload)
	}
}

func TestAHelloDropsQueuedOutput(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	go st.Write(make([]byte, 4*InitialCredit)) // more than the socket pair and the credit take
	time.Sleep(20 * time.Millisecond)
	h.connect(2) // reads and drops everything before its HELLO
	if f, err := h.nextWithin(50 * time.Millisecond); err == nil {
		t.Fatalf("%s on %d came after the new epoch began", typeNames[f.Type], f.Stream)
	}
}

func TestAHostThatDiedInsideAFrameIsFollowedByAnother(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	accept(t, s)
	h.raw(Append(nil, Frame{Data, 1, make([]byte, 30000)})[:12345])
	h.connect(2)
	h.send(Frame{Open, 1, nil}, Frame{Data, 1, []byte("new")})
	buf := make([]byte, 8)
	n, err := accept(t, s).Read(buf)
	if string(buf[:n]) != "new" || err != nil {
		t.Fatalf("read %q, %v", buf[:n], err)
	}
}

func TestCreditStopsASenderAndWindowLetsItGoOn(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	done := make(chan error, 1)
	go func() {
		_, err := st.Write(make([]byte, InitialCredit+1000))
		done <- err
	}()
	total := 0
	for total < InitialCredit {
		total += len(h.expect(Data, 1).Payload)
	}
	if _, err := h.nextWithin(50 * time.Millisecond); err == nil {
		t.Fatal("data came beyond the credit")
	}
	h.send(Frame{Window, 1, grant(400)})
	if n := len(h.expect(Data, 1).Payload); n != 400 {
		t.Fatalf("%d bytes came for a credit of 400", n)
	}
	h.send(Frame{Window, 1, grant(10000)})
	if n := len(h.expect(Data, 1).Payload); n != 600 {
		t.Fatalf("%d bytes came, not the rest", n)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestCreditIsReturnedWhenTheApplicationHasRead(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	for range InitialCredit / MaxPayload {
		h.send(Frame{Data, 1, make([]byte, MaxPayload)})
	}
	if _, err := h.nextWithin(50 * time.Millisecond); err == nil {
		t.Fatal("credit was returned for bytes that nobody has read")
	}
	io.ReadFull(st, make([]byte, InitialCredit/2))
	returned := 0
	for returned < InitialCredit/4 {
		returned += int(binary.BigEndian.Uint32(h.expect(Window, 1).Payload))
	}
}

func TestDataBeyondTheCreditIsAnsweredByReset(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	for range InitialCredit / MaxPayload {
		h.send(Frame{Data, 1, make([]byte, MaxPayload)})
	}
	h.send(Frame{Data, 1, []byte{1}})
	h.expect(Reset, 1)
	if _, err := io.ReadAll(st); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("the reader saw %v", err)
	}
}

func TestUnknownStreams(t *testing.T) {
	_, h := newPair(t)
	h.connect(1)
	h.send(Frame{Window, 4, grant(1)}, Frame{Close, 5, nil}, Frame{Reset, 6, nil}, Frame{Data, 7, []byte("x")})
	h.expect(Reset, 7)
	h.send(Frame{Open, 3, nil}, Frame{Open, 3, nil}, Frame{Open, 2, nil})
	h.expect(Reset, 3)
	h.expect(Reset, 2)
}

func TestTooManyStreamsAreRefused(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	for id := range uint32(MaxStreams) {
		h.send(Frame{Open, id + 1, nil})
	}
	h.send(Frame{Open, MaxStreams + 1, nil})
	h.expect(Reset, MaxStreams+1)
	if s.Streams() != MaxStreams {
		t.Fatalf("%d streams", s.Streams())
	}
	h.send(Frame{Reset, 5, nil}, Frame{Open, MaxStreams + 2, nil}, Frame{Data, MaxStreams + 2, []byte("room")})
	if _, err := h.nextWithin(50 * time.Millisecond); err == nil {
		t.Fatal("a stream was refused although there was room")
	}
}

func TestAPeersResetEndsReadersAndWriters(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	errs := make(chan error, 2)
	go func() { _, err := st.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := st.Write(make([]byte, 2*InitialCredit)); errs <- err }()
	h.expect(Data, 1)
	h.send(Frame{Reset, 1, nil})
	for range 2 {
		if err := <-errs; !errors.Is(err, syscall.ECONNRESET) {
			t.Fatalf("got %v", err)
		}
	}
	st.Close()
	if s.Streams() != 0 {
		t.Fatal("the stream is still there")
	}
}

func TestCloseWithUnreadBytesResetsAfterTheAnswer(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil}, Frame{Data, 1, []byte("unread")})
	st := accept(t, s)
	for { // until the bytes are there
		s.mu.Lock()
		n := st.received.len()
		s.mu.Unlock()
		if n > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	st.Write([]byte("answer"))
	st.Close()
	h.expect(Data, 1)
	h.expect(Close, 1)
	h.expect(Reset, 1)
}

func TestDataAfterCloseIsAnsweredByReset(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	accept(t, s).Close()
	h.expect(Close, 1)
	h.send(Frame{Data, 1, []byte("late")})
	h.expect(Reset, 1)
	if s.Streams() != 0 {
		t.Fatal("the stream is still there")
	}
}

func TestDeadlines(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil})
	st := accept(t, s)
	st.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := st.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read: %v", err)
	}
	// A deadline in the past interrupts a reader that waits already.
	st.SetReadDeadline(time.Time{})
	got := make(chan error, 1)
	go func() { _, err := st.Read(make([]byte, 1)); got <- err }()
	time.Sleep(10 * time.Millisecond)
	st.SetReadDeadline(time.Unix(1, 0))
	if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("interrupted read: %v", err)
	}
	st.SetDeadline(time.Time{})
	h.send(Frame{Data, 1, []byte("k")})
	if n, err := st.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Fatalf("read after the deadline was lifted: %d, %v", n, err)
	}
	go func() {
		for {
			if _, err := h.nextWithin(patience); err != nil {
				return
			}
		}
	}()
	st.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	n, err := st.Write(make([]byte, InitialCredit+5))
	if n != InitialCredit || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("write: %d, %v", n, err)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Fatal("a deadline must be a timeout for net/http")
	}
}

func TestStreamsTakeTurns(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil}, Frame{Open, 2, nil})
	bulk, small := accept(t, s), accept(t, s)
	go bulk.Write(make([]byte, InitialCredit))
	h.expect(Data, 1)
	// With the port full and the bulk stream waiting, a small answer comes
	// within a few frames, not behind the bulk.
	time.Sleep(20 * time.Millisecond)
	go small.Write([]byte("small"))
	time.Sleep(20 * time.Millisecond)
	before := 0
	for {
		f := h.next()
		if f.Stream == 2 {
			break
		}
		before += len(f.Payload)
	}
	if before > 5*MaxPayload {
		t.Fatalf("%d bytes of the bulk stream came before the small answer", before)
	}
}

func TestTwoBulkStreamsShareThePortEvenly(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	h.send(Frame{Open, 1, nil}, Frame{Open, 2, nil})
	endless := make([]byte, 32<<20)
	for _, st := range []*Stream{accept(t, s), accept(t, s)} {
		go st.Write(endless) // one write, so that only the session decides
	}
	time.Sleep(20 * time.Millisecond)
	got := map[uint32]int{}
	for got[1]+got[2] < 4<<20 {
		f := h.expectData()
		got[f.Stream] += len(f.Payload)
		h.send(Frame{Window, f.Stream, grant(uint32(len(f.Payload)))})
	}
	if ratio := float64(got[1]) / float64(got[2]); ratio < 0.8 || ratio > 1.25 {
		t.Fatalf("shares: %v", got)
	}
}

func (h *testHost) expectData() Frame {
	h.t.Helper()
	f := h.next()
	if f.Type != Data {
		h.t.Fatalf("got %s on %d", typeNames[f.Type], f.Stream)
	}
	return f
}

// dialer is a complete host side, good enough for net/http's client.
type dialer struct {
	mu      sync.Mutex
	host    *testHost
	last    uint32
	streams map[uint32]*hostStream
}

type hostStream struct {
	net.Conn // the client's end of a pipe; frames are moved by two goroutines
	feed     *io.PipeWriter
	from     *io.PipeReader
	d        *dialer
	id       uint32
	credit   chan int
}

func (d *dialer) open() *hostStream {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last++
	from, feed := io.Pipe()
	st := &hostStream{feed: feed, from: from, d: d, id: d.last, credit: make(chan int, 1000)}
	st.credit <- InitialCredit
	d.streams[d.last] = st
	d.host.send(Frame{Open, d.last, nil})
	return st
}

func (d *dialer) run() {
	for {
		f, err := d.host.nextWithin(time.Hour)
		if err != nil {
			return
		}
		d.mu.Lock()
		st := d.streams[f.Stream]
		d.mu.Unlock()
		switch f.Type {
		case Data:
			// The test's readers never stop reading, so this does not stall.
			st.feed.Write(f.Payload)
			d.mu.Lock()
			d.host.send(Frame{Window, f.Stream, grant(uint32(len(f.Payload)))})
			d.mu.Unlock()
		case Window:
			st.credit <- int(binary.BigEndian.Uint32(f.Payload))
		case Close:
			st.feed.Close()
		case Reset:
			st.feed.CloseWithError(syscall.ECONNRESET)
		}
	}
}

func (st *hostStream) Read(p []byte) (int, error) { return st.from.Read(p) }

func (st *hostStream) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		credit := <-st.credit
		n := min(credit, len(p), MaxPayload)
		if credit > n {
			st.credit <- credit - n
		}
		st.d.mu.Lock()
		st.d.host.send(Frame{Data, st.id, p[:n]})
		st.d.mu.Unlock()
		p = p[n:]
	}
	return total, nil
}

func (st *hostStream) Close() error {
	st.d.mu.Lock()
	defer st.d.mu.Unlock()
	st.d.host.send(Frame{Close, st.id, nil})
	return nil
}

func (st *hostStream) SetDeadline(time.Time) error      { return nil }
func (st *hostStream) SetReadDeadline(time.Time) error  { return nil }
func (st *hostStream) SetWriteDeadline(time.Time) error { return nil }
func (st *hostStream) LocalAddr() net.Addr              { return Addr{} }
func (st *hostStream) RemoteAddr() net.Addr             { return Addr{} }

func TestTwoHundredConcurrentStreamsOfHTTP(t *testing.T) {
	s, h := newPair(t)
	h.connect(1)
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(err)
		}
		w.Write(bytes.ToUpper(body))
	})
	server := &http.Server{Handler: echo}
	go server.Serve(s)
	d := &dialer{host: h, streams: map[uint32]*hostStream{}}
	go d.run()
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return d.open(), nil },
		DisableKeepAlives: true,
	}}
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			// Up to three times the window, so that flow control is at work.
			body := strings.Repeat(fmt.Sprintf("stream-%d;", i), 10+i*350)
			response, err := client.Post("http://guest/", "text/plain", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			defer response.Body.Close()
			got, err := io.ReadAll(response.Body)
			if err != nil || string(got) != strings.ToUpper(body) {
				t.Errorf("stream %d: %d of %d bytes, %v", i, len(got), len(body), err)
			}
		})
	}
	group.Wait()
	server.Close()
}

// hangUpPort reports that its host has gone whenever a nil is sent.
type hangUpPort struct {
	input  chan []byte
	output io.Writer
}

func (p *hangUpPort) Read(b []byte) (int, error) {
	chunk, ok := <-p.input
	if !ok {
		return 0, io.EOF
	}
	if chunk == nil {
		return 0, ErrNoHost
	}
	return copy(b, chunk), nil
}

func (p *hangUpPort) Write(b []byte) (int, error) { return p.output.Write(b) }
func (p *hangUpPort) Close() error                { return nil }

func TestAHangUpThatArrivesLateDoesNotEndTheStreamsOfTheNextHost(t *testing.T) {
	p := &hangUpPort{input: make(chan []byte), output: io.Discard}
	s := NewSession(p)
	p.input <- append(hello(1), Append(nil, Frame{Open, 1, nil})...)
	old := accept(t, s)
	p.input <- append(hello(2), Append(nil, Frame{Open, 1, nil})...)
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("got %v", err)
	}
	st := accept(t, s)
	p.input <- nil // the hang-up of the first host
	p.input <- Append(nil, Frame{Data, 1, []byte("x")})
	b := make([]byte, 1)
	if _, err := st.Read(b); err != nil || b[0] != 'x' {
		t.Fatalf("got %q, %v", b, err)
	}
	close(p.input)
	if _, err := s.Accept(); !errors.Is(err, io.EOF) {
		t.Fatalf("accept after the port's end: %v", err)
	}
}

func TestTheRingKeepsOrderWhileItGrowsAndWraps(t *testing.T) {
	var r ring
	var want, got []byte
	next := byte(0)
	for i := range 3000 {
		chunk := make([]byte, i%700)
		for j := range chunk {
			chunk[j] = next
			next++
		}
		r.write(chunk)
		want = append(want, chunk...)
		buf := make([]byte, (i*13)%900)
		got = append(got, buf[:r.read(buf)]...)
	}
	rest := make([]byte, r.len())
	r.read(rest)
	if !bytes.Equal(append(got, rest...), want) {
		t.Fatal("bytes were lost or changed places")
	}
}
