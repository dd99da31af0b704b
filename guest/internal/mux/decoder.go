package mux

import (
	"bytes"
	"encoding/binary"
)

// helloPrefix is what every HELLO starts with; the checksum and the epoch follow.
var helloPrefix = []byte{'F', 'U', version, byte(Hello), 0, 0, 0, 0, 0, 0, 0, EpochSize}

// Decoder finds frames in a byte stream. It starts out of sync, and a bad
// header or checksum puts it out of sync again: then bytes are dropped one at
// a time, those of the rejected frame included, until a valid HELLO starts.
type Decoder struct {
	buf    []byte
	start  int // first byte not consumed
	end    int // end of the bytes read
	inSync bool
}

// NewDecoder returns a decoder that waits for a HELLO.
func NewDecoder() *Decoder {
	return &Decoder{buf: make([]byte, 4*MaxFrame)}
}

// Space returns the free part of the buffer to read into. It invalidates the
// payload of the last frame.
func (d *Decoder) Space() []byte {
	if d.start == d.end {
		d.start, d.end = 0, 0
	}
	// At least one whole frame fits behind a partial one, so a read can
	// always make progress.
	if len(d.buf)-d.end < MaxFrame {
		copy(d.buf, d.buf[d.start:d.end])
		d.end -= d.start
		d.start = 0
	}
	return d.buf[d.end:]
}

// Advance says that n bytes were read into Space.
func (d *Decoder) Advance(n int) { d.end += n }

// InSync reports whether the last bytes belonged to a valid frame sequence.
func (d *Decoder) InSync() bool { return d.inSync }

// Next returns the next complete frame, or false when more bytes are needed.
func (d *Decoder) Next() (Frame, bool) {
	for {
		if !d.inSync && !d.search() {
			return Frame{}, false
		}
		pending := d.buf[d.start:d.end]
		if len(pending) < HeaderSize {
			return Frame{}, false
		}
		length, err := payloadLength(pending)
		if err != nil {
			d.inSync = false
			continue
		}
		if len(pending) < HeaderSize+length {
			return Frame{}, false
		}
		frame := pending[:HeaderSize+length]
		if checksum(frame) != binary.BigEndian.Uint32(frame[12:16]) {
			d.inSync = false
			continue
		}
		d.start += len(frame)
		return Frame{Type(frame[3]), binary.BigEndian.Uint32(frame[4:8]), frame[HeaderSize:]}, true
	}
}

// search drops bytes until a valid HELLO starts; false when none is complete yet.
func (d *Decoder) search() bool {
	for {
		pending := d.buf[d.start:d.end]
		at := bytes.Index(pending, helloPrefix)
		if at < 0 {
			// The tail may be the beginning of a prefix.
			if keep := len(helloPrefix) - 1; len(pending) > keep {
				d.start = d.end - keep
			}
			return false
		}
		d.start += at
		if d.end-d.start < helloSize {
			return false
		}
		hello := d.buf[d.start : d.start+helloSize]
		if checksum(hello) == binary.BigEndian.Uint32(hello[12:16]) {
			d.inSync = true
			return true
		}
		d.start++
	}
}
