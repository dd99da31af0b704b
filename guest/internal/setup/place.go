package setup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"fused/internal/files"
)

// maxLinks is how many symbolic links the kernel follows.
const maxLinks = 40

// kernelFolders hold no files: what is renamed into them would hide a device,
// or fail half-way.
var kernelFolders = []string{"/proc", "/sys", "/dev"}

// place returns where a file ends up when every symbolic link is followed. The
// file itself and its parents need not exist. It refuses the secret folder and
// the kernel's own, also where only a link leads there.
func (k *Keeper) place(path string) (string, error) {
	clean, err := files.CheckPath(path)
	if err != nil {
		return "", err
	}
	resolved, err := resolve(clean)
	if err != nil {
		return "", err
	}
	for _, place := range []string{clean, resolved} {
		if k.folder != "" && isBelow(place, k.folder) {
			return "", badPath(path, path+" ends in "+k.folder+", which is for the entries of `fuse`; name it there, without the folder")
		}
		for _, folder := range kernelFolders {
			if isBelow(place, folder) {
				return "", badPath(path, path+" ends in "+folder+", which is the kernel's; choose another place")
			}
		}
	}
	return resolved, nil
}

func isBelow(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, strings.TrimSuffix(folder, "/")+"/")
}

// resolve follows symbolic links one component at a time.
func resolve(path string) (string, error) {
	done, left := "/", split(path)
	for links := 0; len(left) > 0; {
		next := filepath.Join(done, left[0])
		left = left[1:]
		target, err := os.Readlink(next)
		if err != nil { // no link, or not there
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", &os.PathError{Op: "write", Path: path, Err: syscall.ELOOP}
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(done, target)
		}
		done, left = "/", slices.Concat(split(filepath.Clean(target)), left)
	}
	return done, nil
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}
