package files

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"fused/internal/fault"
)

// copySize fills several frames of the multiplexer at a time.
const copySize = 256 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, copySize); return &b }}

// Copy is io.Copy with a large buffer that is used again.
func Copy(to io.Writer, from io.Reader) (int64, error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	// Hiding ReadFrom and WriteTo keeps io from using small buffers of its own.
	return io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, *buf)
}

// Content is an open regular file.
type Content struct {
	*os.File
	Size    int64
	Mode    uint32
	ModTime time.Time
}

// Open opens a regular file for reading; symbolic links are followed.
func Open(path string) (*Content, error) {
	// Non-blocking, because opening a FIFO would wait for a writer.
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var stat syscall.Stat_t
	if err = syscall.Fstat(fd, &stat); err == nil {
		switch stat.Mode & syscall.S_IFMT {
		case syscall.S_IFREG:
			return &Content{os.NewFile(uintptr(fd), path), stat.Size, stat.Mode, mtime(&stat)}, nil
		case syscall.S_IFDIR:
			err = syscall.EISDIR
		default:
			err = fault.New("not_supported", path+" is a device, pipe or socket; only files have content", "path", path)
		}
	}
	syscall.Close(fd)
	return nil, &os.PathError{Op: "open", Path: path, Err: err}
}

// Written is the answer to a write.
type Written struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"size_bytes"`
	SHA256    string `json:"sha256"`
}

// Target says how a file is to be written. Nil means: as the file that is there,
// else 0644 and root.
type Target struct {
	Mode    *uint32
	Owner   *Owner
	Parents bool
}

// Write replaces a file by what body holds, completely or not at all.
func Write(path string, t Target, body io.Reader) (Written, error) {
	place, err := followLinks(path)
	if err != nil {
		return Written{}, err
	}
	owner, mode := t.attributes(place)
	if t.Parents {
		if err := MakeFolders(filepath.Dir(place), 0o755, t.ownerOfNew()); err != nil {
			return Written{}, err
		}
	}
	if info, err := os.Stat(place); err == nil && info.IsDir() {
		return Written{}, &os.PathError{Op: "write", Path: path, Err: syscall.EISDIR}
	}
	temporary, err := createBeside(place)
	if err != nil {
		return Written{}, err
	}
	written := Written{Path: path}
	digest := sha256.New()
	written.SizeBytes, err = fill(temporary, body, digest, owner, mode)
	if err == nil {
		err = os.Rename(temporary.Name(), place)
	}
	if err != nil {
		os.Remove(temporary.Name())
		return Written{}, err
	}
	written.SHA256 = hex.EncodeToString(digest.Sum(nil))
	return written, nil
}

func (t Target) ownerOfNew() Owner {
	if t.Owner != nil {
		return *t.Owner
	}
	return Owner{}
}

// attributes returns the owner and mode of the new file: what was asked for,
// else what the present file has.
func (t Target) attributes(place string) (Owner, uint32) {
	owner, mode := Owner{}, uint32(0o644)
	var stat syscall.Stat_t
	if syscall.Stat(place, &stat) == nil && stat.Mode&syscall.S_IFMT == syscall.S_IFREG {
		owner, mode = Owner{stat.Uid, stat.Gid}, stat.Mode&0o7777
	}
	if t.Owner != nil {
		owner = *t.Owner
	}
	if t.Mode != nil {
		mode = *t.Mode
	}
	return owner, mode
}

func fill(file *os.File, body io.Reader, digest hash.Hash, owner Owner, mode uint32) (int64, error) {
	defer file.Close()
	size, err := Copy(io.MultiWriter(file, digest), body)
	if err == nil {
		err = file.Chown(int(owner.UID), int(owner.GID))
	}
	if err == nil {
		err = os.NewSyscallError("fchmod", syscall.Fchmod(int(file.Fd()), mode))
	}
	if err == nil {
		err = file.Sync()
	}
	return size, err
}

// createBeside makes a new file in the same folder, so that rename is atomic.
func createBeside(place string) (*os.File, error) {
	for {
		name := filepath.Join(filepath.Dir(place), ".fuse-"+strconv.FormatUint(rand.Uint64(), 36)+".tmp")
		file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
		if err == nil || !os.IsExist(err) {
			return file, err
		}
	}
}

// followLinks returns where a write through symbolic links ends up. The last
// part need not exist.
func followLinks(path string) (string, error) {
	for range maxLinks {
		target, err := os.Readlink(path)
		if err != nil {
			return path, nil
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return "", &os.PathError{Op: "write", Path: path, Err: syscall.ELOOP}
}
