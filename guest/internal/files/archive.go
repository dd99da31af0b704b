package files

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// Archive writes a file or folder as tar, names relative to its parent. Links
// are kept. Other file systems mounted below are left out, as /proc would
// never end.
func Archive(path string, to io.Writer) error {
	a := &archiver{tar: tar.NewWriter(to), links: map[inode]string{}}
	var stat syscall.Stat_t
	if err := syscall.Lstat(path, &stat); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	a.device = stat.Dev
	name := filepath.Base(path)
	if path == "/" {
		name = "."
	}
	if err := a.add(path, name); err != nil {
		return err
	}
	return a.tar.Close()
}

type inode struct{ device, number uint64 }

type archiver struct {
	tar    *tar.Writer
	device uint64
	links  map[inode]string // names of files that have several
}

func (a *archiver) add(path, name string) error {
	var stat syscall.Stat_t
	if err := syscall.Lstat(path, &stat); err != nil {
		if err == syscall.ENOENT {
			return nil // removed meanwhile
		}
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	header := &tar.Header{
		Name: name, Mode: int64(stat.Mode & 0o7777), Uid: int(stat.Uid), Gid: int(stat.Gid), ModTime: mtime(&stat),
	}
	switch stat.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return a.addFile(path, header, &stat)
	case syscall.S_IFDIR:
		return a.addFolder(path, header, &stat)
	case syscall.S_IFLNK:
		header.Typeflag = tar.TypeSymlink
		var err error
		if header.Linkname, err = os.Readlink(path); err != nil {
			return err
		}
		return a.tar.WriteHeader(header)
	}
	return nil // devices, pipes and sockets mean nothing elsewhere
}

func (a *archiver) addFile(path string, header *tar.Header, stat *syscall.Stat_t) error {
	if stat.Nlink > 1 {
		id := inode{stat.Dev, stat.Ino}
		if first, seen := a.links[id]; seen {
			header.Typeflag, header.Linkname = tar.TypeLink, first
			return a.tar.WriteHeader(header)
		}
		a.links[id] = header.Name
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	header.Typeflag, header.Size = tar.TypeReg, stat.Size
	if err := a.tar.WriteHeader(header); err != nil {
		return err
	}
	// A file that grows meanwhile is cut at the announced size; one that
	// shrinks makes the next header fail, and with it the archive.
	_, err = Copy(a.tar, io.LimitReader(file, stat.Size))
	return err
}

func (a *archiver) addFolder(path string, header *tar.Header, stat *syscall.Stat_t) error {
	header.Typeflag = tar.TypeDir
	header.Name += "/"
	if err := a.tar.WriteHeader(header); err != nil {
		return err
	}
	if stat.Dev != a.device {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := a.add(filepath.Join(path, entry.Name()), header.Name+entry.Name()); err != nil {
			return err
		}
	}
	return nil
}
