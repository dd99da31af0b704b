package mux

import (
	"bytes"
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
