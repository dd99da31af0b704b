package execframe

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"testing"
	"testing/iotest"
)

var update = flag.Bool("update", false, "write the golden file")

const goldenPath = "../../../tests/golden/exec_frames.json"

type goldenFrame struct {
	Name       string `json:"name"`
	Hex        string `json:"hex"`
	Type       uint8  `json:"type"`
	TypeName   string `json:"type_name"`
	PayloadHex string `json:"payload_hex"`
}

type goldenInvalid struct {
	Name string `json:"name"`
	Hex  string `json:"hex"`
}

type goldenFile struct {
	Description []string        `json:"description"`
	Frames      []goldenFrame   `json:"frames"`
	Invalid     []goldenInvalid `json:"invalid"`
}

var typeNames = []string{"STDIN", "STDOUT", "STDERR", "RESIZE", "EXIT", "SIGNAL", "STDIN_EOF", "STARTED", "ERROR", "START"}

func wantedGolden() goldenFile {
	file := goldenFile{Description: []string{
		"Frames of docs/guest-protocol.md, section 3. Written by `go test ./internal/execframe -update` in guest/.",
		"frames: hex is the whole frame; JSON payloads are compared as bytes when decoding, as JSON when encoding.",
		"invalid: bytes that a reader refuses as soon as it has the header.",
	}}
	cases := []struct {
		name    string
		kind    Type
		payload string
	}{
		{"start", Start, `{"cmd":["/bin/sh","-c","exit 3"],"env":{"K":"V"},"tty":true,"rows":24,"cols":80}`},
		{"started", Started, `{"pid":137}`},
		{"stdin", Stdin, "echo hi\n"},
		{"stdin empty", Stdin, ""},
		{"stdout binary", Stdout, "\x00\x01\xfe\xff\r\n"},
		{"stderr", Stderr, "sh: not found\n"},
		{"resize", Resize, `{"rows":50,"cols":132}`},
		{"signal by name", Signal, `{"signal":"INT"}`},
		{"signal by number", Signal, `{"signal":15}`},
		{"stdin eof", StdinEOF, ""},
		{"exit", Exit, `{"exit_code":3,"timed_out":false,"duration_ms":12}`},
		{"exit by signal", Exit, `{"exit_code":137,"signal":"KILL","timed_out":false,"duration_ms":1200}`},
		{"exit by time limit", Exit, `{"exit_code":124,"timed_out":true,"duration_ms":60001}`},
		{"error", Error, `{"code":"invalid_argument","details":{"command":"nope","reason":"command_not_found"},"error":"no executable program \"nope\" in PATH"}`},
	}
	for _, c := range cases {
		file.Frames = append(file.Frames, goldenFrame{
			c.name, hex.EncodeToString(Append(nil, c.kind, []byte(c.payload))), uint8(c.kind), typeNames[c.kind],
			hex.EncodeToString([]byte(c.payload)),
		})
	}
	file.Invalid = []goldenInvalid{
		{"unknown type 10", "0a00000000000000"},
		{"reserved byte not zero", "0100000100000000"},
		{"payload of 1048577 bytes", "0100000000100001"},
	}
	return file
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

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGoldenFramesEncodeAndDecode(t *testing.T) {
	file := loadGolden(t)
	var all []byte
	for _, g := range file.Frames {
		want := unhex(t, g.Hex)
		if got := Append(nil, Type(g.Type), unhex(t, g.PayloadHex)); !bytes.Equal(got, want) {
			t.Errorf("%s: encoded differently", g.Name)
		}
		all = append(all, want...)
	}
	r := NewReader(iotest.OneByteReader(bytes.NewReader(all)))
	for _, g := range file.Frames {
		kind, payload, err := r.Next()
		if err != nil || kind != Type(g.Type) || hex.EncodeToString(payload) != g.PayloadHex {
			t.Errorf("%s: decoded differently: %v %q %v", g.Name, kind, payload, err)
		}
	}
	if _, _, err := r.Next(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func TestGoldenInvalidHeadersAreRefused(t *testing.T) {
	for _, g := range loadGolden(t).Invalid {
		if _, _, err := NewReader(bytes.NewReader(unhex(t, g.Hex))).Next(); !errors.Is(err, ErrFrame) {
			t.Errorf("%s: %v", g.Name, err)
		}
	}
}

func TestAFrameThatIsCutOffIsNoOrderlyEnd(t *testing.T) {
	whole := Append(nil, Stdout, []byte("hello"))
	for n := 1; n < len(whole); n++ {
		_, _, err := NewReader(bytes.NewReader(whole[:n])).Next()
		if err != io.ErrUnexpectedEOF {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestTheLargestPayload(t *testing.T) {
	payload := bytes.Repeat([]byte{7}, MaxPayload)
	_, got, err := NewReader(bytes.NewReader(Append(nil, Stdin, payload))).Next()
	if err != nil || !bytes.Equal(got, payload) {
		t.Fatal(len(got), err)
	}
}
