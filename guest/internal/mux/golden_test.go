package mux

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden file")

const goldenPath = "../../../tests/golden/mux_frames.json"

type goldenFrame struct {
	Name       string `json:"name,omitempty"`
	Hex        string `json:"hex,omitempty"`
	Type       uint8  `json:"type"`
	TypeName   string `json:"type_name,omitempty"`
	Stream     uint32 `json:"stream"`
	PayloadHex string `json:"payload_hex"`
}

type goldenInvalid struct {
	Name string `json:"name"`
	Hex  string `json:"hex"`
}

type goldenResync struct {
	Name        string        `json:"name"`
	Description string        `json:"description"`
	Roles       []string      `json:"roles"`
	InputHex    string        `json:"input_hex"`
	EpochHex    string        `json:"epoch_hex"`
	FramesAfter []goldenFrame `json:"frames_after"`
}

type goldenFile struct {
	Description []string        `json:"description"`
	Frames      []goldenFrame   `json:"frames"`
	Invalid     []goldenInvalid `json:"invalid"`
	Resync      []goldenResync  `json:"resync"`
}

var typeNames = []string{"HELLO", "OPEN", "DATA", "WINDOW", "CLOSE", "RESET"}

func golden(f Frame) goldenFrame {
	return goldenFrame{Type: uint8(f.Type), TypeName: typeNames[f.Type], Stream: f.Stream, PayloadHex: hex.EncodeToString(f.Payload)}
}

func (g goldenFrame) frame(t *testing.T) Frame {
	return Frame{Type(g.Type), g.Stream, unhex(t, g.PayloadHex)}
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i * 7)
	}
	return p
}

func epoch(b byte) []byte { return bytes.Repeat([]byte{b}, EpochSize) }

func hello(b byte) []byte { return Append(nil, Frame{Hello, 0, epoch(b)}) }

func goldenFrames() []goldenFrame {
	named := []struct {
		name  string
		frame Frame
	}{
		{"hello", Frame{Hello, 0, pattern(EpochSize)}},
		{"open first stream", Frame{Open, 1, nil}},
		{"open highest stream", Frame{Open, 0xffffffff, nil}},
		{"data of one byte", Frame{Data, 1, []byte{0}}},
		{"data with text", Frame{Data, 2, []byte("GET /health HTTP/1.1\r\nHost: guest\r\n\r\n")}},
		{"data that contains the magic", Frame{Data, 3, []byte("FU\x01\x00FU\x01\x02")}},
		{"largest data", Frame{Data, 0x01020304, pattern(MaxPayload)}},
		{"window", Frame{Window, 7, []byte{0, 2, 0, 0}}},
		{"close", Frame{Close, 7, nil}},
		{"reset", Frame{Reset, 0x7fffffff, nil}},
	}
	var list []goldenFrame
	for _, n := range named {
		g := golden(n.frame)
		g.Name, g.Hex = n.name, hex.EncodeToString(Append(nil, n.frame))
		list = append(list, g)
	}
	return list
}

// resealed is a frame with a changed header and a checksum that fits, so that
// only the header is wrong.
func resealed(f Frame, change func(frame []byte)) []byte {
	frame := Append(nil, f)
	change(frame)
	seal(frame)
	return frame
}

func goldenInvalids() []goldenInvalid {
	data := Frame{Data, 5, []byte("hello")}
	corrupt := func(at int) []byte {
		frame := Append(nil, data)
		frame[at] ^= 1
		return frame
	}
	cases := []struct {
		name  string
		bytes []byte
	}{
		{"wrong magic", resealed(data, func(f []byte) { f[1] = 'V' })},
		{"version 2", resealed(data, func(f []byte) { f[2] = 2 })},
		{"type 6", resealed(data, func(f []byte) { f[3] = 6 })},
		{"wrong checksum", corrupt(15)},
		{"changed stream id", corrupt(7)},
		{"changed payload", corrupt(HeaderSize)},
		{"data without payload", resealed(Frame{Data, 5, nil}, func([]byte) {})},
		{"payload of 32769 bytes", resealed(Frame{Data, 5, pattern(MaxPayload + 1)}, func([]byte) {})},
		{"window of 3 bytes", resealed(Frame{Window, 5, []byte{0, 0, 1}}, func([]byte) {})},
		{"open with payload", resealed(Frame{Open, 5, []byte{1}}, func([]byte) {})},
		{"hello of 15 bytes", resealed(Frame{Hello, 0, pattern(15)}, func([]byte) {})},
		{"hello on a stream", resealed(Frame{Hello, 1, pattern(EpochSize)}, func([]byte) {})},
		{"data on stream 0", resealed(Frame{Data, 0, []byte("x")}, func([]byte) {})},
		{"zeros", make([]byte, HeaderSize)},
	}
	var list []goldenInvalid
	for _, c := range cases {
		list = append(list, goldenInvalid{c.name, hex.EncodeToString(c.bytes)})
	}
	return list
}

func goldenResyncs() []goldenResync {
	both, guest := []string{"guest", "host"}, []string{"guest"}
	open := Frame{Open, 1, nil}
	data := Frame{Data, 1, []byte("after")}
	tail := slices.Concat(Append(nil, open), Append(nil, data))
	after := []goldenFrame{golden(open), golden(data)}
	largest := Append(nil, Frame{Data, 9, pattern(MaxPayload)})
	short := Append(nil, Frame{Data, 9, pattern(600)})
	zeros := make([]byte, MaxFrame)
	someZeros := zeros[:1024] // enough for the short frame; keeps this file small
	badCRC := func(payload []byte) []byte {
		frame := Append(nil, Frame{Data, 9, payload})
		frame[12] ^= 0xff
		return frame
	}
	badHello := hello(0xbb)
	badHello[12] ^= 1
	cases := []struct {
		name, description string
		roles             []string
		input             []byte
	}{
		{"clean start", "the bytes of a host that connects: zeros, HELLO, frames", both, slices.Concat(zeros, hello(0xaa), tail)},
		{"no zeros", "HELLO at once", both, slices.Concat(hello(0xaa), tail)},
		{"foreign bytes before", "text and a lonely magic before the HELLO", both,
			slices.Concat([]byte("login: FU\x01FU\x01\x00FU"), hello(0xaa), tail)},
		{"half header then a new host", "an earlier host died inside a header", both,
			slices.Concat(hello(0x11), short[:9], someZeros, hello(0xaa), tail)},
		{"half payload then a new host", "an earlier host died inside a payload; the zeros complete the frame, whose checksum fails", both,
			slices.Concat(hello(0x11), short[:300], someZeros, hello(0xaa), tail)},
		{"one byte missing then a new host", "an earlier host died one byte before the end of the largest frame", both,
			slices.Concat(hello(0x11), largest[:MaxFrame-1], zeros, hello(0xaa), tail)},
		{"whole frames of an earlier epoch", "what belongs to an earlier epoch does not count", both,
			slices.Concat(hello(0x11), tail, hello(0xaa), tail)},
		{"hello with a wrong checksum before", "only a valid HELLO ends the search", both,
			slices.Concat(badHello, hello(0xaa), tail)},
		{"hello inside a rejected frame", "a frame in sync with a wrong checksum is searched, too", guest,
			slices.Concat(hello(0x11), badCRC(slices.Concat([]byte("junk"), hello(0xaa), tail)))},
		{"hello begins inside a rejected frame", "the HELLO starts in the rejected frame's announced length and ends behind it", guest,
			slices.Concat(hello(0x11), badCRC(pattern(64))[:60], hello(0xaa), tail)},
		{"bad type then hello", "an unknown type is out of sync", guest,
			slices.Concat(hello(0x11), []byte("FU\x01\x09\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00"), hello(0xaa), tail)},
		{"frames while out of sync are dropped", "valid frames after a bad one do not count before the next HELLO", guest,
			slices.Concat(hello(0x11), badCRC([]byte("x")), tail, hello(0xaa), tail)},
	}
	var list []goldenResync
	for _, c := range cases {
		list = append(list, goldenResync{c.name, c.description, c.roles, hex.EncodeToString(c.input), hex.EncodeToString(epoch(0xaa)), after})
	}
	return list
}

func wantedGolden() goldenFile {
	return goldenFile{
		Description: []string{
			"Frames of docs/guest-protocol.md, section 1. Written by `go test ./internal/mux -update` in guest/.",
			"frames: hex is the whole frame; encoding type, stream and payload_hex gives hex, decoding hex gives them back.",
			"invalid: bytes at which a reader that is in sync becomes out of sync.",
			"resync: a reader that starts fresh is fed input_hex, in one piece or byte by byte. The last HELLO it obeys has the epoch " +
				"epoch_hex; frames_after are the frames that follow it. Role guest obeys every valid HELLO (each starts a new epoch); " +
				"role host discards everything until the HELLO with its own epoch, which is epoch_hex.",
		},
		Frames: goldenFrames(), Invalid: goldenInvalids(), Resync: goldenResyncs(),
	}
}

func loadGolden(t *testing.T) goldenFile {
	t.Helper()
	if *update {
		text, err := json.MarshalIndent(wantedGolden(), "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(goldenPath, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(goldenPath)
	if err != nil {
		t.Fatal(err)
	}
	var file goldenFile
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestGoldenFramesEncodeAndDecode(t *testing.T) {
	file := loadGolden(t)
	if len(file.Frames) == 0 {
		t.Fatal("the golden file has no frames")
	}
	for _, g := range file.Frames {
		want, frame := unhex(t, g.Hex), g.frame(t)
		if got := Append(nil, frame); !bytes.Equal(got, want) {
			t.Errorf("%s: encoded differently", g.Name)
		}
		input := want
		if frame.Type != Hello { // a decoder starts with a HELLO
			input = slices.Concat(hello(1), want)
		}
		frames := decodeAll(input, len(input))
		last := frames[len(frames)-1]
		if last.Type != frame.Type || last.Stream != frame.Stream || !bytes.Equal(last.Payload, frame.Payload) {
			t.Errorf("%s: decoded differently: %v %v", g.Name, last.Type, last.Stream)
		}
	}
}

func TestGoldenInvalidBytesPutADecoderOutOfSync(t *testing.T) {
	for _, g := range loadGolden(t).Invalid {
		d := NewDecoder()
		feed(d, hello(1), MaxFrame)
		if !d.InSync() {
			t.Fatal("not in sync after HELLO")
		}
		if frames := feed(d, unhex(t, g.Hex), MaxFrame); len(frames) != 0 || d.InSync() {
			t.Errorf("%s: accepted", g.Name)
		}
	}
}

func TestGoldenResync(t *testing.T) {
	for _, g := range loadGolden(t).Resync {
		for _, step := range []int{1 << 20, 4096, 7, 1} {
			if step == 1 && len(g.InputHex) > 1000 && testing.Short() {
				continue
			}
			frames := decodeAll(unhex(t, g.InputHex), step)
			at := lastHello(frames)
			if at < 0 || hex.EncodeToString(frames[at].Payload) != g.EpochHex {
				t.Fatalf("%s: no HELLO with the epoch (step %d)", g.Name, step)
			}
			var got []string
			for _, f := range frames[at+1:] {
				got = append(got, golden(f).String())
			}
			var want []string
			for _, f := range g.FramesAfter {
				want = append(want, f.String())
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: step %d: got %v, want %v", g.Name, step, got, want)
			}
		}
	}
}

func (g goldenFrame) String() string {
	return strings.Join([]string{typeNames[g.Type], hex.EncodeToString([]byte{byte(g.Stream)}), g.PayloadHex}, " ")
}

func lastHello(frames []Frame) int {
	for i, f := range slices.Backward(frames) {
		if f.Type == Hello {
			return i
		}
	}
	return -1
}

func decodeAll(input []byte, step int) []Frame { return feed(NewDecoder(), input, step) }

// feed gives the decoder its input in steps and returns copies of the frames.
func feed(d *Decoder, input []byte, step int) []Frame {
	var frames []Frame
	for len(input) > 0 {
		n := copy(d.Space(), input[:min(step, len(input))])
		d.Advance(n)
		input = input[n:]
		for {
			f, ok := d.Next()
			if !ok {
				break
			}
			f.Payload = bytes.Clone(f.Payload)
			frames = append(frames, f)
		}
	}
	return frames
}
