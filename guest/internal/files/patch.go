package files

import (
	"io"
	"os"
	"path/filepath"
	"syscall"

	"fused/internal/fault"
)

// Patched is the answer to a write in place.
type Patched struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes"` // of the whole file afterwards
}

// WriteAt writes what body holds into a file, from offset on; the rest of the
// file stays. A file that is not there is made, with a hole up to the offset.
// It is no replacement at once: whoever reads meanwhile may see half of it.
func WriteAt(path string, offset int64, t Target, body io.Reader) (Patched, error) {
	place, err := followLinks(path)
	if err != nil {
		return Patched{}, err
	}
	if t.Parents {
		if err := MakeFolders(filepath.Dir(place), 0o755, t.ownerOfNew()); err != nil {
			return Patched{}, err
		}
	}
	file, err := t.openForPatch(place)
	if err != nil {
		return Patched{}, err
	}
	defer file.Close()
	if _, err := Copy(io.NewOffsetWriter(file, offset), body); err != nil {
		return Patched{}, err
	}
	if err := file.Sync(); err != nil {
		return Patched{}, err
	}
	info, err := file.Stat()
	if err != nil {
		return Patched{}, err
	}
	return Patched{path, info.Size()}, nil
}

// openForPatch opens a regular file, made with the target's owner and mode where
// there is none.
func (t Target) openForPatch(place string) (*os.File, error) {
	const flags = syscall.O_WRONLY | syscall.O_CLOEXEC | syscall.O_NONBLOCK
	fd, err := syscall.Open(place, flags, 0)
	if err == syscall.ENOENT {
		owner, mode := t.attributes(place)
		if fd, err = syscall.Open(place, flags|syscall.O_CREAT|syscall.O_EXCL, 0o600); err == nil {
			if err = syscall.Fchown(fd, int(owner.UID), int(owner.GID)); err == nil {
				err = syscall.Fchmod(fd, mode)
			}
			if err != nil {
				syscall.Close(fd)
			}
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: place, Err: err}
	}
	var stat syscall.Stat_t
	if err := syscall.Fstat(fd, &stat); err != nil || stat.Mode&syscall.S_IFMT != syscall.S_IFREG {
		syscall.Close(fd)
		return nil, fault.New("not_supported", place+" is a device, pipe or socket; only files have content", "path", place)
	}
	return os.NewFile(uintptr(fd), place), nil
}
