// Package setup writes what an environment brings into its machine: secrets into
// the folder that never reaches a disk, files, variables, the working directory.
package setup

import (
	"encoding/base64"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"fused/internal/fault"
	"fused/internal/files"
)

const (
	maxID      = 200
	maxEntries = 4096
	// DaemonName is the one name in the folder that is not a setup's: the
	// downloaded daemon.
	DaemonName = "agent"
)

// File is one file to write.
type File struct {
	ContentB64 string `json:"content_b64"`
	Mode       string `json:"mode"`
}

// Body is what PUT /setup takes.
type Body struct {
	ID      string            `json:"id"`
	Fuse    map[string]File   `json:"fuse"`
	Files   map[string]File   `json:"files"`
	Env     map[string]string `json:"env"`
	Workdir string            `json:"workdir"`
}

// CheckID says whether a text may be the id of a setup or an order.
func CheckID(id string) error {
	if id == "" || len(id) > maxID || !utf8.ValidString(id) || strings.ContainsFunc(id, isControl) {
		return fault.BadRequest("id", "id must be 1 to "+strconv.Itoa(maxID)+" characters without control characters")
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func (b *Body) check() error {
	if err := CheckID(b.ID); err != nil {
		return err
	}
	if n := len(b.Fuse) + len(b.Files); n > maxEntries {
		return fault.BadRequest("files", strconv.Itoa(n)+" files are too many for one setup; send at most "+strconv.Itoa(maxEntries)+", or an archive")
	}
	for name, value := range b.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fault.BadRequest("env", "env has a name or value that no process can have: "+strconv.Quote(name))
		}
	}
	return nil
}

// content decodes a file's bytes.
func (f File) content(field string) ([]byte, error) {
	data, err := base64.StdEncoding.DecodeString(f.ContentB64)
	if err != nil {
		return nil, fault.BadRequest(field+".content_b64", "the content of "+field+" is no base64: "+err.Error())
	}
	return data, nil
}

// mode returns the file's mode, or otherwise where none is given.
func (f File) mode(otherwise *uint32) (*uint32, error) {
	if f.Mode == "" {
		return otherwise, nil
	}
	mode, err := files.ParseMode(f.Mode)
	return &mode, err
}

// checkName says whether a name may stand below the secret folder.
func checkName(name string) error {
	switch {
	case name == "" || path.IsAbs(name) || strings.ContainsRune(name, 0) || path.Clean(name) != name || name == "." || !filepath.IsLocal(name):
		return badPath(name, "the name "+strconv.Quote(name)+" in fuse must be a relative path without . and ..")
	case name == DaemonName || strings.HasPrefix(name, DaemonName+"/"):
		return badPath(name, "the name "+DaemonName+" in fuse belongs to the downloaded daemon; use another")
	}
	return nil
}

func badPath(path, text string) error { return fault.New("bad_path", text, "path", path) }
