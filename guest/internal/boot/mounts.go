package boot

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

const (
	noSuid = syscall.MS_NOSUID
	noDev  = syscall.MS_NODEV
	noExec = syscall.MS_NOEXEC
)

// mountKernelFilesystems mounts what the agent itself needs; they move along
// to the real root.
func mountKernelFilesystems() error {
	return mountAll([]mount{
		{"proc", "/proc", "proc", noSuid | noDev | noExec, ""},
		{"sysfs", "/sys", "sysfs", noSuid | noDev | noExec, ""},
		{"devtmpfs", "/dev", "devtmpfs", noSuid, "mode=0755"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", noSuid | noDev | noExec, "nsdelegate"},
	})
}

// mountUserFilesystems mounts what programs expect of a running system.
func mountUserFilesystems() error {
	err := mountAll([]mount{
		{"devpts", "/dev/pts", "devpts", noSuid | noExec, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", noSuid | noDev, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", noSuid | noDev, "mode=755"},
	})
	if err == nil {
		err = mountSecrets()
	}
	if err != nil {
		return err
	}
	// /tmp belongs to the disk, whose size the user chose; memory would be too small for what programs put there.
	for _, shared := range []string{"/run/lock", "/tmp"} {
		if err := os.Mkdir(shared, 0o777); err == nil {
			os.Chmod(shared, 0o777|os.ModeSticky)
		}
	}
	// devtmpfs knows devices only; these links are otherwise made by udev.
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		os.Symlink(target, "/dev/"+name)
	}
	return nil
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := syscall.Mount(m.source, m.target, m.kind, m.flags, m.data)
		// EBUSY: the kernel mounted it by itself, as some do with devtmpfs.
		if err != nil && !errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	return nil
}
