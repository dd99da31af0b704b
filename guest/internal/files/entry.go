package files

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Entry describes one name in a folder; symbolic links are not followed.
type Entry struct {
	Path      string `json:"path"`
	Name      string `json:"name"`
	Type      string `json:"type"`
	SizeBytes int64  `json:"size_bytes"`
	Mode      string `json:"mode"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	MtimeMS   int64  `json:"mtime_ms"`
	Target    string `json:"target,omitempty"`
}

// Stat describes a path.
func Stat(path string) (Entry, error) {
	var stat syscall.Stat_t
	if err := syscall.Lstat(path, &stat); err != nil {
		return Entry{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	entry := Entry{
		Path: path, Name: filepath.Base(path), Type: typeOf(stat.Mode), SizeBytes: stat.Size, Mode: FormatMode(stat.Mode),
		UID: stat.Uid, GID: stat.Gid, MtimeMS: mtime(&stat).UnixMilli(),
	}
	if entry.Type == "symlink" {
		entry.Target, _ = os.Readlink(path)
	}
	return entry, nil
}

// List describes what a folder holds, sorted by name.
func List(path string) ([]Entry, error) {
	names, err := os.ReadDir(path) // sorted
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, 0, len(names))
	for _, name := range names {
		entry, err := Stat(filepath.Join(path, name.Name()))
		if os.IsNotExist(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry)
	}
	return entries, nil
}

func typeOf(mode uint32) string {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return "file"
	case syscall.S_IFDIR:
		return "directory"
	case syscall.S_IFLNK:
		return "symlink"
	}
	return "other"
}

// FormatMode prints the permission bits, always with a leading zero.
func FormatMode(mode uint32) string { return fmt.Sprintf("0%03o", mode&0o7777) }

func mtime(stat *syscall.Stat_t) time.Time { return time.Unix(stat.Mtim.Unix()) }
