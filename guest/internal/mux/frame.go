// Package mux turns one byte channel (a virtio-serial port) into many
// independent connections. docs/guest-protocol.md, section 1, is the contract.
//
// frame.go and decoder.go are pure; session.go, stream.go and writer.go own
// the goroutines and the lock.
package mux

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// Frame layout, all integers big-endian.
const (
	HeaderSize = 16
	MaxPayload = 32768
	MaxFrame   = HeaderSize + MaxPayload
	EpochSize  = 16
	version    = 1
	helloSize  = HeaderSize + EpochSize
)

// Type is the kind of a frame.
type Type uint8

// Frame types.
const (
	Hello Type = iota
	Open
	Data
	Window
	Close
	Reset
)

// Frame is one unit on the port. A decoded Payload aliases the decoder's
// buffer: it is valid until the decoder is given more bytes.
type Frame struct {
	Type    Type
	Stream  uint32
	Payload []byte
}

// ErrFrame says that the bytes are no valid frame.
var ErrFrame = errors.New("mux: invalid frame")

// Append encodes a frame behind dst.
func Append(dst []byte, f Frame) []byte {
	start := len(dst)
	dst = appendHeader(dst, f.Type, f.Stream, len(f.Payload))
	dst = append(dst, f.Payload...)
	seal(dst[start:])
	return dst
}

// appendHeader writes a header whose checksum seal fills in later.
func appendHeader(dst []byte, t Type, stream uint32, length int) []byte {
	dst = append(dst, 'F', 'U', version, byte(t))
	dst = binary.BigEndian.AppendUint32(dst, stream)
	dst = binary.BigEndian.AppendUint32(dst, uint32(length))
	return append(dst, 0, 0, 0, 0)
}

// seal computes the checksum of one whole frame in place.
func seal(frame []byte) {
	binary.BigEndian.PutUint32(frame[12:16], checksum(frame))
}

func checksum(frame []byte) uint32 {
	sum := crc32.ChecksumIEEE(frame[:12])
	return crc32.Update(sum, crc32.IEEETable, frame[HeaderSize:])
}

// payloadLength checks a header and returns the length that it announces.
// A length that the type does not allow is as bad as a wrong magic: both mean
// that the reader is not where it believes to be.
func payloadLength(header []byte) (int, error) {
	if header[0] != 'F' || header[1] != 'U' || header[2] != version {
		return 0, ErrFrame
	}
	stream := binary.BigEndian.Uint32(header[4:8])
	length := binary.BigEndian.Uint32(header[8:12])
	if !lengthAllowed(Type(header[3]), length) || (Type(header[3]) == Hello) != (stream == 0) {
		return 0, ErrFrame
	}
	return int(length), nil
}

func lengthAllowed(t Type, length uint32) bool {
	switch t {
	case Hello:
		return length == EpochSize
	case Data:
		return length >= 1 && length <= MaxPayload
	case Window:
		return length == 4
	case Open, Close, Reset:
		return length == 0
	}
	return false
}
