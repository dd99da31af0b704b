package files

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"fused/internal/fault"
)

// Extracted is the answer to an extraction.
type Extracted struct {
	Entries int   `json:"entries"`
	Bytes   int64 `json:"bytes"`
}

// Extract unpacks a tar archive, plain or gzip, below a folder. os.Root keeps
// every step inside, whatever links the archive or the folder contain.
func Extract(folder string, owner Owner, from io.Reader) (Extracted, error) {
	if info, err := os.Stat(folder); err == nil && !info.IsDir() {
		return Extracted{}, &fs.PathError{Op: "extract", Path: folder, Err: syscall.ENOTDIR}
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return Extracted{}, err
	}
	defer root.Close()
	plain, err := decompress(from)
	if err != nil {
		return Extracted{}, badArchive(err)
	}
	x := &extractor{root: root, owner: owner}
	if err := x.all(tar.NewReader(plain)); err != nil {
		return Extracted{}, err
	}
	x.setFolderTimes()
	// What is left is padding; a connection with unread bytes cannot go on.
	if _, err := Copy(io.Discard, from); err != nil {
		return Extracted{}, badArchive(err)
	}
	return x.done, nil
}

func decompress(from io.Reader) (io.Reader, error) {
	buffered := bufio.NewReaderSize(from, copySize)
	magic, _ := buffered.Peek(2)
	if len(magic) == 2 && magic[0] == 0x1f && magic[1] == 0x8b {
		return gzip.NewReader(buffered)
	}
	return buffered, nil
}

func badArchive(err error) error {
	return fault.BadRequest("body", "the body is no complete tar or tar.gz archive: "+err.Error())
}

type extractor struct {
	root    *os.Root
	owner   Owner
	done    Extracted
	folders []folderTime // set last, because filling a folder changes its time
}

type folderTime struct {
	name string
	at   time.Time
}

func (x *extractor) all(archive *tar.Reader) error {
	for {
		header, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return badArchive(err)
		}
		name, err := safeName(header.Name)
		if err != nil {
			return err
		}
		if err := x.entry(name, header, archive); err != nil {
			return entryFault(header.Name, err)
		}
	}
}

// safeName returns the name relative to the folder.
func safeName(name string) (string, error) {
	clean := path.Clean(name)
	if name == "" || strings.ContainsRune(name, 0) || !filepath.IsLocal(clean) || hasDotDot(name) {
		return "", leaves(name)
	}
	return clean, nil
}

// hasDotDot finds ".." even where cleaning hides it: in a/../b it depends on
// what a is.
func hasDotDot(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

func leaves(name string) error {
	return badPath(name, "the archive's entry "+name+" would leave the folder")
}

// entryFault translates os.Root's refusal, which has no error value of its own.
func entryFault(name string, err error) error {
	if strings.Contains(err.Error(), "path escapes from parent") {
		return leaves(name)
	}
	return fault.OnPath(name, err)
}

func (x *extractor) entry(name string, header *tar.Header, content io.Reader) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if err := x.parents(name); err != nil {
		return err
	}
	var err error
	switch header.Typeflag {
	case tar.TypeDir:
		err = x.folder(name, header)
	case tar.TypeReg, tar.TypeGNUSparse:
		err = x.file(name, header, content)
	case tar.TypeSymlink:
		err = x.symlink(name, header)
	case tar.TypeLink:
		err = x.link(name, header)
	default:
		err = fault.New("not_supported", "the archive's entry "+header.Name+" is a device or pipe", "path", header.Name)
	}
	if err == nil {
		x.done.Entries++
	}
	return err
}

// parents makes the folders that the archive does not list itself.
func (x *extractor) parents(name string) error {
	parent := path.Dir(name)
	if parent == "." {
		return nil
	}
	if info, err := x.root.Stat(parent); err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: parent, Err: syscall.ENOTDIR}
		}
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := x.parents(parent); err != nil {
		return err
	}
	if err := x.root.Mkdir(parent, 0o755); err != nil {
		return err
	}
	return x.root.Lchown(parent, int(x.owner.UID), int(x.owner.GID))
}

func (x *extractor) folder(name string, header *tar.Header) error {
	if name != "." {
		// A link to a folder inside is as good as the folder (/lib -> usr/lib).
		info, err := x.root.Stat(name)
		if err == nil && !info.IsDir() {
			err = x.root.Remove(name)
			info = nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if info == nil {
			if err := x.root.Mkdir(name, 0o700); err != nil {
				return err
			}
		} else if link, _ := x.root.Lstat(name); link != nil && link.Mode()&fs.ModeSymlink != 0 {
			return nil
		}
	}
	x.folders = append(x.folders, folderTime{name, header.ModTime})
	return x.attributes(name, header)
}

func (x *extractor) attributes(name string, header *tar.Header) error {
	if err := x.root.Lchown(name, int(x.owner.UID), int(x.owner.GID)); err != nil {
		return err
	}
	return x.root.Chmod(name, header.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky))
}

// makeRoom removes what a new entry replaces; a folder is not replaced.
func (x *extractor) makeRoom(name string) error {
	if name == "." {
		return leaves(name)
	}
	info, err := x.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		return &fs.PathError{Op: "extract", Path: name, Err: syscall.EISDIR}
	}
	return x.root.Remove(name)
}

func (x *extractor) file(name string, header *tar.Header, content io.Reader) error {
	if err := x.makeRoom(name); err != nil {
		return err
	}
	file, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	size, err := Copy(file, content)
	x.done.Bytes += size
	if err != nil {
		x.root.Remove(name)
		if ours := (*fs.PathError)(nil); errors.As(err, &ours) { // from writing, not from reading
			return err
		}
		return badArchive(err)
	}
	if err := x.attributes(name, header); err != nil {
		return err
	}
	return x.root.Chtimes(name, header.ModTime, header.ModTime)
}

func (x *extractor) symlink(name string, header *tar.Header) error {
	if err := x.makeRoom(name); err != nil {
		return err
	}
	// The target may lead anywhere: it is followed by nobody here.
	if err := x.root.Symlink(header.Linkname, name); err != nil {
		return err
	}
	return x.root.Lchown(name, int(x.owner.UID), int(x.owner.GID))
}

func (x *extractor) link(name string, header *tar.Header) error {
	target, err := safeName(header.Linkname)
	if err != nil {
		return err
	}
	if target == name {
		return nil
	}
	if err := x.makeRoom(name); err != nil {
		return err
	}
	return x.root.Link(target, name)
}

func (x *extractor) setFolderTimes() {
	for _, folder := range x.folders {
		x.root.Chtimes(folder.name, folder.at, folder.at)
	}
}
