package process

import (
	"strings"
	"sync"
)

// Tail keeps the last bytes of a command's output, for a sentence about its end.
type Tail struct {
	Limit int

	mu   sync.Mutex
	text []byte
}

// Write is a Sink.
func (t *Tail) Write(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p[max(0, len(p)-t.Limit):]...)
	t.text = append(t.text[:0], t.text[max(0, len(t.text)-t.Limit):]...)
}

// Words is the end of a sentence: ": " and the text; "" for a silent command.
func (t *Tail) Words() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	printable := func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f {
			return -1
		}
		return r
	}
	text := strings.TrimSpace(strings.Map(printable, strings.ToValidUTF8(string(t.text), "")))
	if text == "" {
		return ""
	}
	return ": " + text
}
