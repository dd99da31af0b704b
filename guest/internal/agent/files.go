package agent

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"

	"fused/internal/fault"
	"fused/internal/files"
)

func queryPath(r *http.Request) (string, error) { return files.CheckPath(r.URL.Query().Get("path")) }

// readFile answers GET and HEAD.
func (a *Agent) readFile(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	content, err := files.Open(path)
	if err != nil {
		return fault.OnPath(path, err)
	}
	defer content.Close()
	part, err := parseRange(r.Header.Get("Range"), content.Size)
	if err != nil {
		return err
	}
	header := w.Header()
	header.Set("Content-Type", "application/octet-stream")
	header.Set("Accept-Ranges", "bytes")
	header.Set("X-Fuse-Mode", files.FormatMode(content.Mode))
	header.Set("X-Fuse-Mtime-Ms", strconv.FormatInt(content.ModTime.UnixMilli(), 10))
	if content.Size == 0 && r.Method == http.MethodGet {
		return sendUnsized(w, r, content)
	}
	header.Set("Content-Length", strconv.FormatInt(part.length, 10))
	status := http.StatusOK
	if part.asked {
		header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", part.start, part.start+part.length-1, content.Size))
		status = http.StatusPartialContent
	}
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		sendPart(w, r, content, part)
	}
	return nil
}

// sendUnsized serves the files of /proc and /sys, which have content but no size.
func sendUnsized(w http.ResponseWriter, r *http.Request, content *files.Content) error {
	first := make([]byte, 64<<10)
	n, err := io.ReadFull(content, first)
	switch err {
	case io.EOF, io.ErrUnexpectedEOF:
		w.Header().Set("Content-Length", strconv.Itoa(n))
		w.Write(first[:n])
		return nil
	case nil:
	default:
		return fault.OnPath(content.Name(), err)
	}
	w.Write(first)
	if _, err := files.Copy(w, content); err != nil {
		abort(r)
	}
	return nil
}

func sendPart(w http.ResponseWriter, r *http.Request, content *files.Content, part byteRange) {
	section := io.NewSectionReader(content, part.start, part.length)
	// A file that became shorter cannot keep its announced length.
	if n, err := files.Copy(w, section); err != nil || n != part.length {
		abort(r)
	}
}

type byteRange struct {
	start, length int64
	asked         bool
}

// parseRange reads a Range header. What is no single byte range is ignored, as
// RFC 9110 allows; one that the file does not have is refused.
func parseRange(header string, size int64) (byteRange, error) {
	whole := byteRange{length: size}
	text, isBytes := strings.CutPrefix(header, "bytes=")
	first, last, isRange := strings.Cut(strings.TrimSpace(text), "-")
	if !isBytes || !isRange || strings.Contains(text, ",") {
		return whole, nil
	}
	unsatisfiable := fault.New("bad_range", "the file has "+strconv.FormatInt(size, 10)+" bytes; the range "+header+" is not in it",
		"size", strconv.FormatInt(size, 10))
	if first == "" { // the last n bytes
		n, err := strconv.ParseInt(last, 10, 64)
		if err != nil {
			return whole, nil
		}
		if n <= 0 || size == 0 {
			return whole, unsatisfiable
		}
		n = min(n, size)
		return byteRange{size - n, n, true}, nil
	}
	start, err := strconv.ParseInt(first, 10, 64)
	end := size - 1
	if err == nil && last != "" {
		end, err = strconv.ParseInt(last, 10, 64)
	}
	if err != nil || (last != "" && end < start) {
		return whole, nil
	}
	if start >= size {
		return whole, unsatisfiable
	}
	end = min(end, size-1)
	return byteRange{start, end - start + 1, true}, nil
}

func (a *Agent) owner(r *http.Request) (*files.Owner, error) {
	name := r.URL.Query().Get("user")
	if name == "" {
		return nil, nil
	}
	user, err := a.accounts.Find(name)
	return &files.Owner{UID: user.UID, GID: user.GID}, err
}

func (a *Agent) writeFile(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	target, err := a.target(r)
	if err != nil {
		return err
	}
	written, err := files.Write(path, target, r.Body)
	if err != nil {
		return fault.OnPath(path, err)
	}
	return sendJSON(w, http.StatusOK, written)
}

// target reads how a file is to be written.
func (a *Agent) target(r *http.Request) (files.Target, error) {
	var target files.Target
	if text := r.URL.Query().Get("mode"); text != "" {
		mode, err := files.ParseMode(text)
		if err != nil {
			return target, err
		}
		target.Mode = &mode
	}
	var err error
	if target.Owner, err = a.owner(r); err != nil {
		return target, err
	}
	target.Parents, err = flag(r, "mkdirs", true)
	return target, err
}

// patchFile writes a part of a file in place.
func (a *Agent) patchFile(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	offset, err := number(r, "offset", 0, 0, math.MaxInt64)
	if err != nil {
		return err
	}
	target, err := a.target(r)
	if err != nil {
		return err
	}
	patched, err := files.WriteAt(path, offset, target, r.Body)
	if errors.Is(err, syscall.EFBIG) || errors.Is(err, syscall.EINVAL) {
		return fault.BadRequest("offset", "no file of this machine can have "+strconv.FormatInt(offset, 10)+" bytes")
	}
	if err != nil {
		return fault.OnPath(path, err)
	}
	return sendJSON(w, http.StatusOK, patched)
}

// grep searches until it is done or the client has gone.
func (a *Agent) grep(w http.ResponseWriter, r *http.Request, op operation) error {
	ctx, cancel := gone(r)
	defer cancel()
	found, err := files.Grep(ctx, op.Path, op.Query)
	if ctx.Err() != nil {
		abort(r) // nobody is there to be told
	}
	if err != nil {
		return fault.OnPath(op.Path, err)
	}
	return sendJSON(w, http.StatusOK, found)
}

func (a *Agent) removeFile(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	recursive, err := flag(r, "recursive", false)
	if err != nil {
		return err
	}
	if err := files.Remove(path, recursive); err != nil {
		return fault.OnPath(path, err)
	}
	return noContent(w)
}

// operation is the body of POST /files.
type operation struct {
	Path      string `json:"path"`
	To        string `json:"to"`
	Parents   *bool  `json:"parents"`
	Mode      string `json:"mode"`
	Recursive bool   `json:"recursive"`
	User      string `json:"user"`
	files.Query
}

func (a *Agent) fileOperation(w http.ResponseWriter, r *http.Request) error {
	var op operation
	if err := decode(w, r, &op); err != nil {
		return err
	}
	var err error
	if op.Path, err = files.CheckPath(op.Path); err != nil {
		return err
	}
	switch name := r.URL.Query().Get("op"); name {
	case "stat":
		return sendEntry(w, op.Path)
	case "list":
		entries, err := files.List(op.Path)
		if err != nil {
			return fault.OnPath(op.Path, err)
		}
		return sendJSON(w, http.StatusOK, map[string]any{"entries": entries})
	case "mkdir":
		return a.makeFolder(w, r, op)
	case "move":
		return move(w, op)
	case "remove":
		if err := files.Remove(op.Path, op.Recursive); err != nil {
			return fault.OnPath(op.Path, err)
		}
		return noContent(w)
	case "grep":
		return a.grep(w, r, op)
	default:
		return fault.BadRequest("op", "op must be stat, list, mkdir, move, remove or grep, not "+strconv.Quote(name))
	}
}

func sendEntry(w http.ResponseWriter, path string) error {
	entry, err := files.Stat(path)
	if err != nil {
		return fault.OnPath(path, err)
	}
	return sendJSON(w, http.StatusOK, entry)
}

func (a *Agent) makeFolder(w http.ResponseWriter, r *http.Request, op operation) error {
	mode := uint32(0o755)
	var owner files.Owner
	var err error
	if op.Mode != "" {
		if mode, err = files.ParseMode(op.Mode); err != nil {
			return err
		}
	}
	if asked, err := a.owner(r); err != nil {
		return err
	} else if asked != nil {
		owner = *asked
	}
	if op.Parents == nil || *op.Parents {
		err = files.MakeFolders(op.Path, mode, owner)
	} else {
		err = files.MakeFolder(op.Path, mode, owner)
	}
	if err != nil {
		return fault.OnPath(op.Path, err)
	}
	return sendEntry(w, op.Path)
}

func move(w http.ResponseWriter, op operation) error {
	to, err := files.CheckPath(op.To)
	if err != nil {
		return err
	}
	if err := files.Move(op.Path, to); err != nil {
		// The kernel does not say which of the two it means.
		if _, statErr := os.Lstat(op.Path); statErr == nil {
			return fault.OnPath(to, err)
		}
		return fault.OnPath(op.Path, err)
	}
	return sendEntry(w, to)
}

func (a *Agent) readArchive(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); err != nil {
		return fault.OnPath(path, err)
	}
	w.Header().Set("Content-Type", "application/x-tar")
	if err := files.Archive(path, w); err != nil {
		abort(r)
	}
	return nil
}

func (a *Agent) writeArchive(w http.ResponseWriter, r *http.Request) error {
	path, err := queryPath(r)
	if err != nil {
		return err
	}
	var owner files.Owner
	if asked, err := a.owner(r); err != nil {
		return err
	} else if asked != nil {
		owner = *asked
	}
	done, err := files.Extract(path, owner, r.Body)
	if err != nil {
		return fault.OnPath(path, err)
	}
	return sendJSON(w, http.StatusOK, done)
}
