package files

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"fused/internal/fault"
)

// Remove deletes a file, a link or an empty folder; recursively everything.
func Remove(path string, recursive bool) error {
	if path == "/" {
		return badPath(path, "the root folder cannot be removed")
	}
	if !recursive {
		return removeOne(path)
	}
	if _, err := os.Lstat(path); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

func removeOne(path string) error {
	// unlink says EISDIR or EPERM for folders, depending on the file system.
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = syscall.Rmdir(path)
	} else {
		err = syscall.Unlink(path)
	}
	if err != nil {
		return &os.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// Move renames, across file systems by a copy that appears at once.
func Move(from, to string) error {
	err := os.Rename(from, to)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	temporary := filepath.Join(filepath.Dir(to), ".fuse-move-"+filepath.Base(from))
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	if err = copyTree(from, temporary); err == nil {
		err = os.Rename(temporary, to)
	}
	if err != nil {
		os.RemoveAll(temporary)
		return err
	}
	return os.RemoveAll(from)
}

// copyTree copies a file, link or folder with owners, modes and times.
func copyTree(from, to string) error {
	var stat syscall.Stat_t
	if err := syscall.Lstat(from, &stat); err != nil {
		return &os.PathError{Op: "lstat", Path: from, Err: err}
	}
	var err error
	switch typeOf(stat.Mode) {
	case "file":
		err = copyFile(from, to)
	case "directory":
		err = copyFolder(from, to)
	case "symlink":
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	default:
		err = fault.New("not_supported", from+" is a device, pipe or socket and cannot be moved to another file system", "path", from)
	}
	if err != nil {
		return err
	}
	return copyAttributes(to, &stat)
}

func copyAttributes(to string, stat *syscall.Stat_t) error {
	if err := os.Lchown(to, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	if typeOf(stat.Mode) == "symlink" {
		return nil
	}
	if err := syscall.Chmod(to, stat.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: to, Err: err}
	}
	return os.Chtimes(to, mtime(stat), mtime(stat))
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = Copy(target, source)
	return errors.Join(err, target.Close())
}

func copyFolder(from, to string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	for _, entry := range entries {
		if err == nil {
			err = copyTree(filepath.Join(from, entry.Name()), filepath.Join(to, entry.Name()))
		}
	}
	return err
}
