package process

import (
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"fused/internal/account"
	"fused/internal/fault"
)

// Limits of a request.
const (
	MaxOutput    = 16 << 20
	maxTimeoutMS = math.MaxInt64 / int64(time.Millisecond) // what a time.Duration holds
	defaultRows  = 24
	defaultCols  = 80
	defaultPath  = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	shell        = "/bin/sh"
)

// Request is the "exec request" of the protocol.
type Request struct {
	Cmd            []string          `json:"cmd"`
	Shell          *string           `json:"shell"`
	ImageCommand   bool              `json:"image_command"` // the image's own entrypoint and command
	Env            map[string]string `json:"env"`
	Cwd            string            `json:"cwd"`
	User           string            `json:"user"`
	StdinB64       *[]byte           `json:"stdin_b64"`
	Stdin          bool              `json:"stdin"` // POST /processes only: keep a pipe open
	Key            string            `json:"key"`   // POST /processes only: start once under this name
	TimeoutMS      int64             `json:"timeout_ms"`
	TTY            bool              `json:"tty"`
	Rows           int               `json:"rows"`
	Cols           int               `json:"cols"`
	MaxOutputBytes int64             `json:"max_output_bytes"`
}

// Defaults come from the image and from configure.
type Defaults struct {
	ImageEnv map[string]string
	Workdir  string
	User     string
	Env      map[string]string
	Command  []string
}

// Spec is a request with every name resolved.
type Spec struct {
	Argv []string
	Path string
	Env  []string
	Dir  string
	User account.User
}

// Timeout is 0 for none.
func (r *Request) Timeout() time.Duration { return time.Duration(r.TimeoutMS) * time.Millisecond }

// OutputLimit is how many bytes of each stream a one-shot command keeps.
func (r *Request) OutputLimit() int64 {
	if r.MaxOutputBytes == 0 {
		return MaxOutput
	}
	return min(r.MaxOutputBytes, MaxOutput)
}

// Resolve checks the request and finds its user, folder and program.
func (r *Request) Resolve(d Defaults, accounts account.Database) (Spec, error) {
	if err := r.check(); err != nil {
		return Spec{}, err
	}
	user, err := accounts.Find(firstOf(r.User, d.User))
	if err != nil {
		return Spec{}, err
	}
	spec := Spec{Argv: r.Cmd, User: user}
	switch {
	case r.Shell != nil:
		spec.Argv = []string{shell, "-lc", *r.Shell}
	case r.ImageCommand && len(d.Command) == 0:
		return Spec{}, fault.BadRequest("image_command", "the image has no command of its own; give cmd or shell")
	case r.ImageCommand:
		spec.Argv = d.Command
	}
	env := r.environment(d, user)
	if spec.Dir, err = r.folder(d, user); err != nil {
		return Spec{}, err
	}
	spec.Path, err = lookUp(spec.Argv[0], env["PATH"], spec.Dir)
	for _, name := range slices.Sorted(maps.Keys(env)) {
		spec.Env = append(spec.Env, name+"="+env[name])
	}
	return spec, err
}

func (r *Request) check() error {
	given := 0
	for _, is := range []bool{r.Shell != nil, len(r.Cmd) > 0, r.ImageCommand} {
		if is {
			given++
		}
	}
	switch {
	case given != 1:
		return fault.BadRequest("cmd", "give exactly one of cmd (a list with the program first), shell (a text) and image_command")
	case r.Shell != nil && strings.ContainsRune(*r.Shell, 0):
		return fault.BadRequest("shell", "shell must not contain NUL")
	case r.TimeoutMS < 0 || r.TimeoutMS > maxTimeoutMS:
		return fault.BadRequest("timeout_ms", "timeout_ms must be between 0 (no limit) and "+strconv.FormatInt(maxTimeoutMS, 10))
	case r.MaxOutputBytes < 0:
		return fault.BadRequest("max_output_bytes", "max_output_bytes must not be negative")
	}
	for _, argument := range r.Cmd {
		if strings.ContainsRune(argument, 0) {
			return fault.BadRequest("cmd", "cmd must not contain NUL")
		}
	}
	for name, value := range r.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fault.BadRequest("env", "env has a name or value that no process can have: "+strconv.Quote(name))
		}
	}
	if r.TTY {
		return r.checkSize()
	}
	return nil
}

func (r *Request) checkSize() error {
	if r.Rows == 0 {
		r.Rows = defaultRows
	}
	if r.Cols == 0 {
		r.Cols = defaultCols
	}
	return CheckSize(r.Rows, r.Cols)
}

// CheckSize says whether a terminal can have this size.
func CheckSize(rows, cols int) error {
	for name, value := range map[string]int{"rows": rows, "cols": cols} {
		if value < 1 || value > 65535 {
			return fault.BadRequest(name, name+" must be between 1 and 65535")
		}
	}
	return nil
}

// environment joins what the agent, the image, configure and the request say;
// later ones win.
func (r *Request) environment(d Defaults, user account.User) map[string]string {
	env := map[string]string{
		"PATH": defaultPath, "HOME": user.Home, "USER": user.Name, "LOGNAME": user.Name, "LANG": "C.UTF-8",
	}
	if r.TTY {
		env["TERM"] = "xterm-256color"
	}
	for _, layer := range []map[string]string{d.ImageEnv, d.Env, r.Env} {
		maps.Copy(env, layer)
	}
	return env
}

// folder is the working directory. Only the request's own choice may fail:
// images name folders that do not exist, or that only their own user may enter.
func (r *Request) folder(d Defaults, user account.User) (string, error) {
	if r.Cwd != "" {
		if !filepath.IsAbs(r.Cwd) || strings.ContainsRune(r.Cwd, 0) || !isDir(r.Cwd) {
			return "", badCwd(r.Cwd)
		}
		return r.Cwd, nil
	}
	for _, dir := range []string{d.Workdir, user.Home} {
		if dir != "" && filepath.IsAbs(dir) && isDir(dir) && mayEnter(dir, user) {
			return dir, nil
		}
	}
	return "/", nil
}

func badCwd(dir string) error {
	return fault.New("bad_cwd", "the working directory "+strconv.Quote(dir)+" is no directory that the user may enter", "cwd", dir)
}

// lookUp finds a program as execvp would, with the command's PATH and folder.
func lookUp(name, path, dir string) (string, error) {
	if name == "" {
		return "", fault.BadRequest("cmd", "the program's name is empty")
	}
	if strings.Contains(name, "/") {
		if full := joinTo(dir, name); isProgram(full) {
			return full, nil
		}
		return "", notFound(name, "")
	}
	for _, folder := range filepath.SplitList(path) {
		if full := filepath.Join(joinTo(dir, folder), name); isProgram(full) {
			return full, nil
		}
	}
	return "", notFound(name, " in PATH")
}

func notFound(name, where string) error {
	return fault.New("command_not_found", "no executable program "+strconv.Quote(name)+where, "command", name)
}

func joinTo(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
