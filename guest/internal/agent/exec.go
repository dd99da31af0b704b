package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strconv"

	"fused/internal/fault"
	"fused/internal/process"
)

// keeper keeps the first bytes of a stream and counts all.
type keeper struct {
	limit int64
	kept  []byte
	total int64
}

func (k *keeper) take(p []byte) {
	k.total += int64(len(p))
	if room := k.limit - int64(len(k.kept)); room > 0 {
		k.kept = append(k.kept, p[:min(room, int64(len(p)))]...)
	}
}

func (k *keeper) truncated() bool { return k.total > int64(len(k.kept)) }

// exec runs a command to its end and answers with everything at once.
func (a *Agent) exec(w http.ResponseWriter, r *http.Request) error {
	var request process.Request
	if err := decode(w, r, &request); err != nil {
		return err
	}
	request.TTY = false
	spec, err := request.Resolve(a.commandDefaults(), a.accounts)
	if err != nil {
		return err
	}
	stdout, stderr := keeper{limit: request.OutputLimit()}, keeper{limit: request.OutputLimit()}
	opts := process.Options{Timeout: request.Timeout(), Stdout: stdout.take, Stderr: stderr.take}
	if request.StdinB64 != nil {
		opts.UseStdin, opts.Stdin = true, *request.StdinB64
	}
	command, err := a.config.Launcher.Start(spec, opts)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(r.Context(), command.Kill)
	defer stop()
	exit := command.Exit()
	if r.Context().Err() != nil {
		abort(r)
	}
	return sendResult(w, exit, &stdout, &stderr)
}

// sendResult streams the answer: a JSON encoder would need the output three
// times in memory.
func sendResult(w http.ResponseWriter, exit process.Exit, stdout, stderr *keeper) error {
	head, err := json.Marshal(exit)
	if err != nil {
		return err
	}
	tail, err := json.Marshal(map[string]any{
		"truncated": map[string]bool{"stdout": stdout.truncated(), "stderr": stderr.truncated()},
		"total":     map[string]int64{"stdout": stdout.total, "stderr": stderr.total},
	})
	if err != nil {
		return err
	}
	const outKey, errKey = `,"stdout_b64":"`, `","stderr_b64":"`
	head = append(head[:len(head)-1], outKey...)
	tail = append([]byte(`",`), tail[1:]...)
	encoded := base64.StdEncoding.EncodedLen(len(stdout.kept)) + base64.StdEncoding.EncodedLen(len(stderr.kept))
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(head)+encoded+len(errKey)+len(tail)))
	w.Write(head)
	writeBase64(w, stdout.kept)
	io.WriteString(w, errKey)
	writeBase64(w, stderr.kept)
	w.Write(tail)
	return nil
}

// base64Step is a multiple of three, so that no padding falls in between.
const base64Step = 48 << 10

func writeBase64(w io.Writer, data []byte) {
	buf := make([]byte, base64.StdEncoding.EncodedLen(min(len(data), base64Step)))
	for len(data) > 0 {
		step := data[:min(len(data), base64Step)]
		data = data[len(step):]
		n := base64.StdEncoding.EncodedLen(len(step))
		base64.StdEncoding.Encode(buf[:n], step)
		if _, err := w.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (a *Agent) startProcess(w http.ResponseWriter, r *http.Request) error {
	var request process.Request
	if err := decode(w, r, &request); err != nil {
		return err
	}
	request.TTY = false
	spec, err := request.Resolve(a.commandDefaults(), a.accounts)
	if err != nil {
		return err
	}
	opts := process.Options{Timeout: request.Timeout(), KeepStdin: request.Stdin}
	opts.UseStdin = request.Stdin || request.StdinB64 != nil
	if request.StdinB64 != nil {
		opts.Stdin = *request.StdinB64
	}
	background, err := a.table.Start(spec, opts)
	if err != nil {
		return err
	}
	return sendJSON(w, http.StatusCreated, background.Describe())
}

func (a *Agent) listProcesses(w http.ResponseWriter, _ *http.Request) error {
	return sendJSON(w, http.StatusOK, map[string]any{"processes": a.table.List()})
}

func (a *Agent) showProcess(w http.ResponseWriter, r *http.Request) error {
	background, err := a.table.Get(r.PathValue("pid"))
	if err != nil {
		return err
	}
	return sendJSON(w, http.StatusOK, background.Describe())
}

func (a *Agent) signalProcess(w http.ResponseWriter, r *http.Request) error {
	background, err := a.table.Get(r.PathValue("pid"))
	if err != nil {
		return err
	}
	var body signalBody
	if err := decode(w, r, &body); err != nil {
		return err
	}
	signal, err := body.parse()
	if err != nil {
		return err
	}
	if background.Signal(signal) != nil {
		return process.ProcessNotFound(r.PathValue("pid"))
	}
	return noContent(w)
}

func (a *Agent) feedProcess(w http.ResponseWriter, r *http.Request) error {
	background, err := a.table.Get(r.PathValue("pid"))
	if err != nil {
		return err
	}
	eof, err := flag(r, "eof", false)
	if err != nil {
		return err
	}
	if background.Input() == nil {
		return stdinClosed(r.PathValue("pid"))
	}
	ctx, cancel := gone(r)
	defer cancel()
	n, err := background.Input().Append(ctx, r.Body, eof)
	switch {
	case err == process.ErrInputClosed:
		return stdinClosed(r.PathValue("pid"))
	case err != nil:
		return err
	}
	return sendJSON(w, http.StatusOK, map[string]int64{"bytes": n})
}

func stdinClosed(pid string) error {
	return fault.New("stdin_closed", "process "+pid+" does not read its standard input (any more)", "pid", pid)
}
