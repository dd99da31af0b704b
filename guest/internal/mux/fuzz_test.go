package mux

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
)

// FuzzAnyPrefixIsOvercome: whatever came before, the bytes of a host that
// connects bring the reader into sync, and what follows is read.
func FuzzAnyPrefixIsOvercome(f *testing.F) {
	f.Add([]byte("FU"), uint16(1))
	f.Add(slices.Concat(hello(1), Append(nil, Frame{Data, 1, pattern(500)})[:300]), uint16(100))
	f.Add(append(hello(1), "FU\x01\x02\x00\x00\x00\x01\x00\x00\x80\x00"...), uint16(5000))
	f.Fuzz(func(t *testing.T, prefix []byte, step uint16) {
		open := Frame{Open, 77, nil}
		input := slices.Concat(prefix, make([]byte, MaxFrame), hello(0xaa), Append(nil, open))
		frames := decodeAll(input, int(step)+1)
		at := lastHello(frames)
		if at < 0 || !bytes.Equal(frames[at].Payload, epoch(0xaa)) || len(frames) != at+2 || frames[at+1].Stream != 77 {
			t.Fatalf("%d frames, last HELLO at %d", len(frames), at)
		}
	})
}

// scriptedPort says what it was given, and swallows what it is told.
type scriptedPort struct {
	rest  []byte
	step  int
	check func()
}

func (p *scriptedPort) Read(into []byte) (int, error) {
	p.check()
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(into, p.rest[:min(p.step, len(p.rest))])
	p.rest = p.rest[n:]
	return n, nil
}

func (p *scriptedPort) Write(data []byte) (int, error) { return len(data), nil }
func (p *scriptedPort) Close() error                   { return nil }

// FuzzNoHostBreaksASession (for minutes: go test -fuzz NoHost -fuzzminimizetime 1x, since what
// goroutines cover differs from run to run): whatever a host says after its HELLO, the session
// goes on, and what it keeps of it is bounded.
func FuzzNoHostBreaksASession(f *testing.F) {
	open := Append(nil, Frame{Open, 1, nil})
	f.Add([]byte{}, uint16(1))
	f.Add(slices.Concat(open, Append(nil, Frame{Data, 1, pattern(500)}), Append(nil, Frame{Close, 1, nil})), uint16(7))
	f.Add(bytes.Repeat(open, 3000), uint16(60000))
	f.Add(bytes.Repeat(Append(nil, Frame{Data, 9, pattern(9)}), 3000), uint16(60000))
	f.Add(slices.Concat(open, bytes.Repeat(Append(nil, Frame{Window, 1, []byte{0x7f, 0xff, 0xff, 0xff}}), 9)), uint16(100))
	f.Add(slices.Concat(open, Append(nil, Frame{Reset, 1, nil}), open), uint16(100))
	f.Add(bytes.Repeat(hello(7), 40), uint16(33))
	f.Fuzz(func(t *testing.T, said []byte, step uint16) {
		var session *Session
		made := make(chan struct{})
		port := &scriptedPort{rest: slices.Concat(hello(1), said), step: int(step) + 1, check: func() {
			<-made
			session.mu.Lock()
			defer session.mu.Unlock()
			if len(session.streams) > MaxStreams || len(session.resets) > MaxStreams || len(session.ready) > MaxStreams {
				t.Errorf("%d streams, %d resets, %d ready", len(session.streams), len(session.resets), len(session.ready))
			}
		}}
		session = NewSession(port)
		close(made)
		for {
			if _, err := session.Accept(); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Fatalf("the session has failed: %v", err)
				}
				return
			}
		}
	})
}
