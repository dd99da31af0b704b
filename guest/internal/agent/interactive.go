package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"fused/internal/console"
	"fused/internal/execframe"
	"fused/internal/fault"
	"fused/internal/process"
)

const (
	upgradeName = "fuse-frames/1"
	// Input waits here while the command does not read it, so that signals
	// and sizes that come behind it are not held up. 16 pieces of at most
	// 64 KiB; then the client has to wait.
	inputPieces = 16
	inputPiece  = 64 << 10
	// goneGrace bounds the time that output for a client that has gone may take.
	goneGrace = 5 * time.Second
)

// signalBody accepts a name or a number.
type signalBody struct {
	Signal json.RawMessage `json:"signal"`
}

func (b signalBody) parse() (syscall.Signal, error) {
	text := string(b.Signal)
	var name string
	if json.Unmarshal(b.Signal, &name) == nil {
		text = name
	}
	if text == "" || text == "null" {
		return 0, fault.BadRequest("signal", "signal must be a name like TERM or a number")
	}
	return process.ParseSignal(text)
}

// interactive upgrades the connection to frames.
func (a *Agent) interactive(w http.ResponseWriter, r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), upgradeName) {
		return fault.BadRequest("Upgrade", "GET /exec needs the header Upgrade: "+upgradeName+"; use POST for a one-shot command")
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return err
	}
	defer conn.Close()
	const answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + upgradeName + "\r\n\r\n"
	if _, err := io.WriteString(conn, answer); err != nil {
		return nil
	}
	c := &conversation{agent: a, conn: conn, frames: execframe.NewReader(bufferedReader(buffered.Reader))}
	if err := c.run(); err != nil {
		body := fault.Of(err).Body()
		c.send(execframe.Error, body)
	}
	return nil
}

// bufferedReader makes room for whole frames where net/http's buffer is small.
func bufferedReader(r *bufio.Reader) io.Reader { return bufio.NewReaderSize(r, inputPiece) }

// conversation is one interactive command and its client.
type conversation struct {
	agent   *Agent
	conn    net.Conn
	frames  *execframe.Reader
	command *process.Command
	input   chan []byte // nil: end of input

	writing sync.Mutex
	out     []byte
}

// run returns an error only when nothing was started.
func (c *conversation) run() error {
	request, err := c.start()
	if err != nil {
		return err
	}
	spec, err := request.Resolve(c.agent.commandDefaults(), c.agent.accounts)
	if err != nil {
		return err
	}
	opts := process.Options{
		UseStdin: true, KeepStdin: true, TTY: request.TTY, Rows: request.Rows, Cols: request.Cols, Timeout: request.Timeout(),
		Stdout:  func(p []byte) { c.send(execframe.Stdout, p) },
		Stderr:  func(p []byte) { c.send(execframe.Stderr, p) },
		Started: func(command *process.Command) { c.sendJSON(execframe.Started, map[string]int{"pid": command.PID}) },
	}
	if request.StdinB64 != nil {
		opts.Stdin = *request.StdinB64
	}
	if c.command, err = c.agent.config.Launcher.Start(spec, opts); err != nil {
		return err
	}
	c.input = make(chan []byte, inputPieces)
	console.Go("input", c.feed)
	console.Go("client", c.listen)
	c.sendJSON(execframe.Exit, c.command.Exit())
	return nil
}

func (c *conversation) start() (process.Request, error) {
	var request process.Request
	kind, payload, err := c.frames.Next()
	if err != nil {
		return request, fault.BadRequest("START", "no START frame came: "+err.Error())
	}
	if kind != execframe.Start {
		return request, fault.BadRequest("START", "the first frame must be START")
	}
	return request, parse(payload, &request)
}

// listen obeys the client's frames. Its end before the command's means that
// the client has gone.
func (c *conversation) listen() {
	defer close(c.input)
	for {
		kind, payload, err := c.frames.Next()
		if err == nil {
			err = c.obey(kind, payload)
		}
		if err != nil {
			break
		}
	}
	select {
	case <-c.command.Finished():
	default:
		c.command.HangUp()
		// Nobody may be left to take the output that is on its way.
		c.conn.SetWriteDeadline(time.Now().Add(goneGrace))
	}
}

// obey ignores what it cannot do: a signal to a process that has just ended is
// no reason to end the conversation. Frames that only the agent sends are.
func (c *conversation) obey(kind execframe.Type, payload []byte) error {
	switch kind {
	case execframe.Stdin:
		return c.queue(payload)
	case execframe.StdinEOF:
		return c.pass(nil)
	case execframe.Resize:
		var size struct{ Rows, Cols int }
		if json.Unmarshal(payload, &size) == nil && process.CheckSize(size.Rows, size.Cols) == nil {
			c.command.Resize(size.Rows, size.Cols)
		}
	case execframe.Signal:
		var body signalBody
		if json.Unmarshal(payload, &body) == nil {
			if signal, err := body.parse(); err == nil {
				c.command.Signal(signal)
			}
		}
	default:
		return execframe.ErrFrame
	}
	return nil
}

func (c *conversation) queue(payload []byte) error {
	for len(payload) > 0 {
		piece := bytes.Clone(payload[:min(len(payload), inputPiece)])
		payload = payload[len(piece):]
		if err := c.pass(piece); err != nil {
			return err
		}
	}
	return nil
}

// pass hands a piece to the feeder. While the queue is full it notices the end
// of the command and, on the multiplexer, a client that has gone.
func (c *conversation) pass(piece []byte) error {
	var lost <-chan struct{}
	if stream, ok := c.conn.(interface{ Gone() context.Context }); ok {
		lost = stream.Gone().Done()
	}
	select {
	case c.input <- piece:
		return nil
	case <-c.command.Finished():
		return nil // there may be signals behind it; they do no harm
	case <-lost:
		return io.ErrClosedPipe
	}
}

func (c *conversation) feed() {
	for piece := range c.input {
		// Errors mean that the command does not read any more: not our matter.
		c.command.Input().Append(context.Background(), bytes.NewReader(piece), piece == nil)
	}
}

// send writes one frame at once, header and payload together.
func (c *conversation) send(kind execframe.Type, payload []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.out = execframe.Append(c.out[:0], kind, payload)
	c.conn.Write(c.out)
}

func (c *conversation) sendJSON(kind execframe.Type, value any) {
	payload, err := json.Marshal(value)
	if err == nil {
		c.send(kind, payload)
	}
}
