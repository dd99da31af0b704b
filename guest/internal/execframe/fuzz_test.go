package execframe

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// FuzzReader: no bytes make the reader panic, or take more memory than one
// payload may have.
func FuzzReader(f *testing.F) {
	for _, frame := range wantedGolden().Frames {
		f.Add([]byte(frame.Hex))
	}
	f.Add([]byte{byte(Start), 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{byte(Stdin), 0, 0, 0, 0, 0x0f, 0xff, 0xff, 1})
	f.Add(bytes.Repeat([]byte{0}, 4096))
	f.Fuzz(func(t *testing.T, input []byte) {
		reader := NewReader(bytes.NewReader(input))
		for used := 0; ; {
			_, payload, err := reader.Next()
			if cap(reader.buf) > MaxPayload {
				t.Fatalf("%d bytes are held", cap(reader.buf))
			}
			if err != nil {
				return
			}
			header := input[used : used+HeaderSize]
			used += HeaderSize + len(payload)
			if int(binary.BigEndian.Uint32(header[4:])) != len(payload) {
				t.Fatalf("a payload of %d bytes was announced otherwise", len(payload))
			}
		}
	})
}
