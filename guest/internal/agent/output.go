package agent

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"

	"fused/internal/fault"
	"fused/internal/process"
)

const outputStep = 64 << 10

// processOutput sends retained output from an absolute offset on.
func (a *Agent) processOutput(w http.ResponseWriter, r *http.Request) error {
	background, err := a.table.Get(r.PathValue("pid"))
	if err != nil {
		return err
	}
	return sendOutput(w, r, background.Ring)
}

// sendOutput answers with the retained output of the stream that the query names.
func sendOutput(w http.ResponseWriter, r *http.Request, ringOf func(stream string) *process.Ring) error {
	query := r.URL.Query()
	name := query.Get("stream")
	if name == "" {
		name = "stdout"
	}
	ring := ringOf(name)
	if ring == nil {
		return fault.BadRequest("stream", "stream must be stdout or stderr")
	}
	follow, err := flag(r, "follow", false)
	if err != nil {
		return err
	}
	start, end := ring.Range()
	asked, err := askedOffset(query.Get("offset"), start, end)
	if err != nil {
		return err
	}
	from := max(asked, start)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("X-Fuse-Offset", strconv.FormatInt(from, 10))
	w.Header().Set("X-Fuse-Lost", strconv.FormatInt(from-asked, 10))
	if !follow {
		w.Header().Set("Content-Length", strconv.FormatInt(end-from, 10))
	}
	w.WriteHeader(http.StatusOK)
	return sendRing(w, r, ring, from, end, follow)
}

func askedOffset(text string, start, end int64) (int64, error) {
	if text == "" {
		return start, nil
	}
	offset, err := strconv.ParseInt(text, 10, 64)
	if err != nil || offset < 0 || offset > end {
		return 0, fault.BadRequest("offset", "offset must be a number between 0 and the end of the output, "+strconv.FormatInt(end, 10))
	}
	return offset, nil
}

// sendRing sends what the ring holds. A hole would be silent corruption, so a
// reader that has fallen behind is cut off instead.
func sendRing(w http.ResponseWriter, r *http.Request, ring *process.Ring, from, end int64, follow bool) error {
	control := http.NewResponseController(w)
	buf := make([]byte, outputStep)
	for follow || from < end {
		step := buf
		if follow {
			control.Flush() // also the headers, before the first byte exists
		} else {
			step = buf[:min(int64(len(buf)), end-from)]
		}
		n, err := ring.ReadAt(r.Context(), step, from)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, context.Canceled) || !follow {
				abort(r)
			}
			return nil
		}
		if _, err := w.Write(step[:n]); err != nil {
			abort(r)
		}
		from += int64(n)
	}
	return nil
}
