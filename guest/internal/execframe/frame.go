// Package execframe is the codec of interactive conversations: terminals and
// streaming commands. docs/guest-protocol.md, section 3, is the contract.
package execframe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Limits of the layout: type (1), reserved (3), length (4, big-endian), payload.
const (
	HeaderSize = 8
	MaxPayload = 1 << 20
)

// Type is the kind of a frame.
type Type uint8

// Frame types; 0 to 4 are the numbers of the public attach framing.
const (
	Stdin Type = iota
	Stdout
	Stderr
	Resize
	Exit
	Signal
	StdinEOF
	Started
	Error
	Start
)

// ErrFrame says that the bytes are no valid frame.
var ErrFrame = errors.New("execframe: invalid frame")

// PutHeader writes the header of a frame with length bytes of payload.
func PutHeader(header []byte, t Type, length int) {
	header[0], header[1], header[2], header[3] = byte(t), 0, 0, 0
	binary.BigEndian.PutUint32(header[4:8], uint32(length))
}

// Append encodes a frame behind dst.
func Append(dst []byte, t Type, payload []byte) []byte {
	var header [HeaderSize]byte
	PutHeader(header[:], t, len(payload))
	return append(append(dst, header[:]...), payload...)
}

// Reader reads frames. A payload is valid until the next call.
type Reader struct {
	from io.Reader
	buf  []byte
}

// NewReader reads frames from r, which should be buffered.
func NewReader(r io.Reader) *Reader { return &Reader{from: r} }

// Next returns the next frame; io.EOF only between frames.
func (r *Reader) Next() (Type, []byte, error) {
	var header [HeaderSize]byte
	if _, err := io.ReadFull(r.from, header[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(header[4:8])
	switch {
	case header[1] != 0 || header[2] != 0 || header[3] != 0:
		return 0, nil, fmt.Errorf("%w: reserved bytes are not zero", ErrFrame)
	case header[0] > byte(Start):
		return 0, nil, fmt.Errorf("%w: type %d", ErrFrame, header[0])
	case length > MaxPayload:
		return 0, nil, fmt.Errorf("%w: payload of %d bytes", ErrFrame, length)
	}
	if int(length) > cap(r.buf) {
		r.buf = make([]byte, length)
	}
	payload := r.buf[:length]
	if _, err := io.ReadFull(r.from, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return Type(header[0]), payload, nil
}
