package process

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

// ErrInputClosed says that the command does not read its standard input any more.
var ErrInputClosed = errors.New("standard input is closed")

const endOfTransmission = 4 // what ^D is to a terminal

// Input is the writing side of a command's standard input. Writers take turns.
type Input struct {
	turn     sync.Mutex
	file     *os.File
	terminal bool
	closed   bool // guarded by turn
}

// Append writes everything that r has, waiting for the command to read it, until
// ctx ends. With eof the input is closed afterwards.
func (in *Input) Append(ctx context.Context, r io.Reader, eof bool) (int64, error) {
	in.turn.Lock()
	defer in.turn.Unlock()
	return in.append(ctx, r, eof)
}

// append is Append for whoever has the turn.
func (in *Input) append(ctx context.Context, r io.Reader, eof bool) (int64, error) {
	if in.closed {
		return 0, ErrInputClosed
	}
	restore := in.endWith(ctx)
	defer restore()
	n, err := io.CopyBuffer(struct{ io.Writer }{in.file}, struct{ io.Reader }{r}, make([]byte, 64<<10))
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EIO) {
		in.close()
		return n, ErrInputClosed
	}
	if err == nil && eof {
		in.end()
	}
	return n, err
}

// endWith lets ctx interrupt a blocked write.
func (in *Input) endWith(ctx context.Context) (restore func()) {
	stop := context.AfterFunc(ctx, func() { in.file.SetWriteDeadline(time.Unix(1, 0)) })
	return func() {
		if !stop() {
			in.file.SetWriteDeadline(time.Time{})
		}
	}
}

// end tells the command that no more will come.
func (in *Input) end() {
	if in.terminal {
		in.file.Write([]byte{endOfTransmission})
		return
	}
	in.close()
}

func (in *Input) close() {
	in.closed = true
	if !in.terminal { // a terminal's file is the output's, too
		in.file.Close()
	}
}

// abandon is called when the command has ended; it interrupts writers.
func (in *Input) abandon() {
	if in.terminal {
		in.file.SetWriteDeadline(time.Unix(1, 0))
		return
	}
	in.file.Close()
}
