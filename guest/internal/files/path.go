// Package files is the agent's view of the file system: entries, whole files,
// folders as archives. Everything happens with the machine's own root user.
package files

import (
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"fused/internal/fault"
)

// maxLinks is how many symbolic links the kernel follows.
const maxLinks = 40

// CheckPath returns the path in its shortest form.
func CheckPath(path string) (string, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return "", badPath(path, "the path "+strconv.Quote(path)+" must be absolute and without NUL")
	}
	return filepath.Clean(path), nil
}

func badPath(path, text string) error { return fault.New("bad_path", text, "path", path) }

// ParseMode reads octal permission bits.
func ParseMode(text string) (uint32, error) {
	mode, err := strconv.ParseUint(text, 8, 32)
	if err != nil || mode > 0o7777 {
		return 0, fault.BadRequest("mode", "mode must be octal digits like 0644")
	}
	return uint32(mode), nil
}

// Owner is who new files belong to.
type Owner struct{ UID, GID uint32 }

// MakeFolders makes a folder and its parents; only those that are new get the
// owner and the mode.
func MakeFolders(path string, mode uint32, owner Owner) error {
	err := MakeFolder(path, mode, owner)
	switch {
	case err == nil:
		return nil
	case isErrno(err, syscall.EEXIST):
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return nil
		}
		return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
	case !isErrno(err, syscall.ENOENT) || path == "/":
		return err
	}
	if err := MakeFolders(filepath.Dir(path), mode, owner); err != nil {
		return err
	}
	err = MakeFolder(path, mode, owner)
	if isErrno(err, syscall.EEXIST) { // somebody was faster
		return nil
	}
	return err
}

// MakeFolder makes one folder.
func MakeFolder(path string, mode uint32, owner Owner) error {
	if err := syscall.Mkdir(path, 0o700); err != nil {
		return &fs.PathError{Op: "mkdir", Path: path, Err: err}
	}
	// Owner before mode: chown clears the set-id bits.
	if err := os.Lchown(path, int(owner.UID), int(owner.GID)); err != nil {
		return err
	}
	return syscall.Chmod(path, mode)
}

func isErrno(err error, errno syscall.Errno) bool {
	pathError, ok := err.(*fs.PathError)
	return ok && pathError.Err == errno
}
