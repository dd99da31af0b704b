// Package console writes the agent's few lines to the machine's console, which
// is all an operator sees when the channel never comes up.
package console

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"
)

// Printf writes one line, "fused: <text>".
func Printf(format string, args ...any) {
	// One write per line: lines of the kernel must not end up inside it.
	text := strings.TrimRight(fmt.Sprintf(format, args...), "\n")
	os.Stderr.WriteString("fused: " + text + "\n")
}

// Go runs f on its own goroutine. A panic ends f, never PID 1, because a dead
// PID 1 is a kernel panic.
func Go(name string, f func()) {
	go func() {
		defer func() {
			if cause := recover(); cause != nil {
				Printf("panic in %s: %v\n%s", name, cause, debug.Stack())
			}
		}()
		f()
	}()
}

// Writer lets net/http's error log end up on the console.
type Writer struct{}

func (Writer) Write(p []byte) (int, error) {
	Printf("%s", p)
	return len(p), nil
}
