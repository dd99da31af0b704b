package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const (
	lowerDir = "/.fuse/lower" // the image
	upperDir = "/.fuse/upper" // the private disk
	newRoot  = "/.fuse/root"

	oPath = 0x200000 // O_PATH, which the syscall package lacks
)

// mountRoot joins the image and the private disk and moves into the result.
// Without any disk (the host's probe) the initramfs stays the root. The
// returned paths lead to writable file systems that no other path reaches.
func (m *Machine) mountRoot() ([]string, error) {
	disks, err := findDisks("/sys/block")
	if err != nil {
		return nil, err
	}
	if disks.image == "" {
		return nil, mountUserFilesystems()
	}
	if err := mountLayers(disks); err != nil {
		return nil, err
	}
	// The path by descriptor works after the folder has become unreachable.
	upper, err := syscall.Open(upperDir, oPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := switchRoot(newRoot); err != nil {
		return nil, fmt.Errorf("switch root: %w", err)
	}
	return []string{fmt.Sprintf("/proc/self/fd/%d", upper)}, mountUserFilesystems()
}

type diskPair struct{ image, overlay string }

// findDisks looks for the virtio serials "image" and "overlay". Firecracker
// gives serials of its own; its disks come in the order of its configuration.
func findDisks(sysBlock string) (diskPair, error) {
	names, _ := filepath.Glob(filepath.Join(sysBlock, "vd*"))
	slices.Sort(names)
	var found diskPair
	for _, path := range names {
		serial, _ := os.ReadFile(filepath.Join(path, "serial"))
		device := "/dev/" + filepath.Base(path)
		switch strings.TrimSpace(string(serial)) {
		case "image":
			found.image = device
		case "overlay":
			found.overlay = device
		}
	}
	switch {
	case found.image != "" || len(names) == 0:
		return found, nil
	case found.overlay != "":
		return found, errors.New("no block device with the serial \"image\" (found only \"overlay\")")
	}
	found.image = "/dev/" + filepath.Base(names[0])
	if len(names) > 1 {
		found.overlay = "/dev/" + filepath.Base(names[1])
	}
	return found, nil
}

func mountLayers(disks diskPair) error {
	for _, dir := range []string{lowerDir, upperDir, newRoot} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount(disks.image, lowerDir, "ext4", syscall.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount the image %s (ext4): %w", disks.image, err)
	}
	var err error
	if disks.overlay != "" {
		if err = syscall.Mount(disks.overlay, upperDir, "ext4", 0, ""); err == nil {
			growOverlay(disks.overlay, upperDir)
		}
	} else {
		err = syscall.Mount("tmpfs", upperDir, "tmpfs", 0, "mode=755")
	}
	if err != nil {
		return fmt.Errorf("mount the overlay %s: %w", disks.overlay, err)
	}
	return joinLayers()
}

func joinLayers() error {
	if err := os.Mkdir(upperDir+"/work", 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	// The upper folder's mode and owner are what the root's will be.
	if err := os.Mkdir(upperDir+"/upper", 0o755); err == nil {
		if err := copyAttributes(lowerDir, upperDir+"/upper"); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	layers := "lowerdir=" + lowerDir + ",upperdir=" + upperDir + "/upper,workdir=" + upperDir + "/work"
	err := syscall.Mount("overlay", newRoot, "overlay", 0, layers)
	if errors.Is(err, syscall.ENODEV) {
		return errors.New("the kernel has no overlayfs (module overlay)")
	}
	if err != nil {
		return fmt.Errorf("mount overlayfs: %w", err)
	}
	return nil
}

func copyAttributes(from, to string) error {
	var stat syscall.Stat_t
	if err := syscall.Stat(from, &stat); err != nil {
		return err
	}
	if err := syscall.Chown(to, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	return syscall.Chmod(to, stat.Mode&0o7777)
}

// switchRoot moves the kernel's file systems and then itself into the new root
// and deletes the initramfs, whose files are memory.
func switchRoot(root string) error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(dir, root+dir, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := syscall.Chdir(root); err != nil {
		return err
	}
	deleteInitramfs("/")
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return err
	}
	if err := syscall.Chroot("."); err != nil {
		return err
	}
	return syscall.Chdir("/")
}

// deleteInitramfs removes everything on the file system of dir. It never
// crosses into another one: there lies the user's data.
func deleteInitramfs(dir string) {
	var own syscall.Stat_t
	if syscall.Lstat(dir, &own) == nil {
		deleteBelow(dir, own.Dev)
	}
}

func deleteBelow(dir string, device uint64) {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		var stat syscall.Stat_t
		if syscall.Lstat(path, &stat) != nil || stat.Dev != device {
			continue
		}
		if entry.IsDir() {
			deleteBelow(path, device)
			syscall.Rmdir(path) // fails for those that hold a mount
			continue
		}
		syscall.Unlink(path)
	}
}
