package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"

	"fused/internal/console"
	"fused/internal/fault"
	"fused/internal/process"
)

// worthReturning is the size from which memory is given back to the kernel at
// once.
const worthReturning = 4 << 20

// keeper keeps the first bytes of a stream and counts all. It keeps them in
// pieces: one growing slice would take up to three times the memory.
type keeper struct {
	limit  int64
	pieces [][]byte
	kept   int64
	total  int64
}

// keeperPiece is a multiple of three, so that base64 needs no padding between
// pieces.
const keeperPiece = 48 << 10

func (k *keeper) take(p []byte) {
	k.total += int64(len(p))
	p = p[:min(int64(len(p)), k.limit-k.kept)]
	k.kept += int64(len(p))
	for len(p) > 0 {
		last := len(k.pieces) - 1
		if last < 0 || len(k.pieces[last]) == keeperPiece {
			// Small outputs are the rule: the first piece grows as needed.
			k.pieces = append(k.pieces, nil)
			last++
		}
		n := min(len(p), keeperPiece-len(k.pieces[last]))
		k.pieces[last] = append(k.pieces[last], p[:n]...)
		p = p[n:]
	}
}

func (k *keeper) truncated() bool { return k.total > k.kept }

func (k *keeper) encodedLen() int { return base64.StdEncoding.EncodedLen(int(k.kept)) }

// writeBase64 sends what was kept. Errors show at the end of the answer.
func (k *keeper) writeBase64(w io.Writer) {
	buf := make([]byte, base64.StdEncoding.EncodedLen(int(min(k.kept, keeperPiece))))
	for _, piece := range k.pieces {
		n := base64.StdEncoding.EncodedLen(len(piece))
		base64.StdEncoding.Encode(buf[:n], piece)
		if _, err := w.Write(buf[:n]); err != nil {
			return
		}
	}
}

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
	err = sendResult(w, exit, &stdout, &stderr)
	if stdout.kept+stderr.kept > worthReturning {
		// An idle agent collects no garbage: the machine would miss this memory.
		stdout, stderr = keeper{}, keeper{}
		console.Go("memory", debug.FreeOSMemory)
	}
	return err
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
	encoded := stdout.encodedLen() + stderr.encodedLen()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(head)+encoded+len(errKey)+len(tail)))
	w.Write(head)
	stdout.writeBase64(w)
	io.WriteString(w, errKey)
	stderr.writeBase64(w)
	w.Write(tail)
	return nil
}

func (a *Agent) startProcess(w http.ResponseWriter, r *http.Request) error {
	var request process.Request
	if err := decode(w, r, &request); err != nil {
		return err
	}
	if request.Key != "" {
		background, isNew, err := a.table.StartOnce(request.Key, func() (process.Spec, process.Options, error) {
			return a.prepareBackground(&request)
		})
		switch {
		case err != nil:
			return err
		case !isNew:
			return sendJSON(w, http.StatusOK, background.Describe())
		}
		return sendJSON(w, http.StatusCreated, background.Describe())
	}
	spec, opts, err := a.prepareBackground(&request)
	if err != nil {
		return err
	}
	background, err := a.table.Start(spec, opts)
	if err != nil {
		return err
	}
	return sendJSON(w, http.StatusCreated, background.Describe())
}

func (a *Agent) prepareBackground(request *process.Request) (process.Spec, process.Options, error) {
	request.TTY = false
	spec, err := request.Resolve(a.commandDefaults(), a.accounts)
	opts := process.Options{Timeout: request.Timeout(), KeepStdin: request.Stdin}
	opts.UseStdin = request.Stdin || request.StdinB64 != nil
	if request.StdinB64 != nil {
		opts.Stdin = *request.StdinB64
	}
	return spec, opts, err
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
	// The answer must not wait for the rest of a body that a person types.
	http.NewResponseController(w).EnableFullDuplex()
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
