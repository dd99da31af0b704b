// Package fault is the agent's error tree: what a client can be told.
// docs/guest-protocol.md, section 2, is the contract.
package fault

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"syscall"
)

// Fault is an error with a public code, a stable reason and details.
type Fault struct {
	Text    string
	Code    string
	Reason  string
	Details map[string]string
}

func (f *Fault) Error() string { return f.Text }

// status maps the public codes to HTTP.
var status = map[string]int{
	"invalid_argument": 400, "not_found": 404, "route_not_found": 404, "conflict": 409, "payload_too_large": 413,
	"internal": 500, "unimplemented": 501, "unavailable": 503, "timeout": 504,
}

// codes maps each reason to its public code.
var codes = map[string]string{
	"bad_request": "invalid_argument", "command_not_found": "invalid_argument", "bad_cwd": "invalid_argument",
	"unknown_user": "invalid_argument", "unknown_signal": "invalid_argument", "bad_path": "invalid_argument",
	"bad_range": "invalid_argument", "file_not_found": "not_found", "process_not_found": "not_found",
	"is_a_directory": "conflict", "not_a_directory": "conflict", "directory_not_empty": "conflict",
	"file_exists": "conflict", "stdin_closed": "conflict", "permission_denied": "conflict",
	"no_space_in_guest": "unavailable", "agent_failure": "internal", "not_supported": "unimplemented",
	"route_not_found": "route_not_found", "payload_too_large": "payload_too_large",
}

// New makes a fault; details are key, value, key, value.
func New(reason, text string, details ...string) *Fault {
	f := &Fault{Text: text, Code: codes[reason], Reason: reason, Details: map[string]string{"reason": reason}}
	for i := 0; i+1 < len(details); i += 2 {
		f.Details[details[i]] = details[i+1]
	}
	return f
}

// BadRequest says which field of the request is wrong.
func BadRequest(field, text string) *Fault {
	return New("bad_request", text, "field", field)
}

// byErrno says what the kernel's answer means to the client.
var byErrno = []struct {
	errno  syscall.Errno
	reason string
	text   string
}{
	{syscall.ENOENT, "file_not_found", "%s does not exist in the machine"},
	{syscall.EISDIR, "is_a_directory", "%s is a directory; name a file"},
	{syscall.ENOTDIR, "not_a_directory", "%s is not a directory, or lies below something that is none"},
	{syscall.ENOTEMPTY, "directory_not_empty", "%s is not empty; remove it recursively"},
	{syscall.EEXIST, "file_exists", "%s exists already"},
	{syscall.EACCES, "permission_denied", "the machine's kernel denies access to %s"},
	{syscall.EPERM, "permission_denied", "the machine's kernel does not permit this on %s"},
	{syscall.EROFS, "permission_denied", "%s is on a read-only file system"},
	{syscall.ENOSPC, "no_space_in_guest", "no space is left for %s; remove files or use a larger disk"},
	{syscall.EDQUOT, "no_space_in_guest", "the disk quota is used up at %s"},
	{syscall.ENAMETOOLONG, "bad_path", "the name %s is too long"},
	{syscall.ELOOP, "bad_path", "%s goes through too many symbolic links"},
}

// OnPath translates what a file operation on path returned. A Fault passes
// through; nil stays nil.
func OnPath(path string, err error) error {
	var f *Fault
	if err == nil || errors.As(err, &f) {
		return err
	}
	for _, known := range byErrno {
		if errors.Is(err, known.errno) {
			return New(known.reason, fmt.Sprintf(known.text, path), "path", path)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return New("file_not_found", path+" does not exist in the machine", "path", path)
	}
	return failure(err)
}

// failure is the translation of last resort: the text carries the errno.
func failure(err error) *Fault {
	text := err.Error()
	var errno syscall.Errno
	if errors.As(err, &errno) {
		text = fmt.Sprintf("%s (errno %d)", text, int(errno))
	}
	return New("agent_failure", text)
}

// Of returns the fault that err is, or wraps it as agent_failure.
func Of(err error) *Fault {
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		limit := strconv.FormatInt(tooLarge.Limit, 10)
		return New("payload_too_large", "the request body is larger than "+limit+" bytes", "limit_bytes", limit)
	}
	return failure(err)
}

// Body is the JSON that tells the client.
func (f *Fault) Body() []byte {
	body, _ := json.Marshal(map[string]any{"error": f.Text, "code": f.Code, "details": f.Details})
	return body
}

// Status is the HTTP status of the fault.
func (f *Fault) Status() int { return status[f.Code] }
