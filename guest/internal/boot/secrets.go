package boot

import (
	"os"
	"syscall"
)

// FuseFolder is where a setup's secrets and the downloaded daemon live: memory,
// so that nothing of them reaches a disk.
const FuseFolder = "/fuse"

// mountSecrets mounts it in the final root. Programs may be run from it: the
// daemon is one.
func mountSecrets() error {
	// An image's own file or link of that name would lead the mount elsewhere.
	if info, err := os.Lstat(FuseFolder); err == nil && !info.IsDir() {
		if err := os.Remove(FuseFolder); err != nil {
			return err
		}
	}
	return mountAll([]mount{
		{"tmpfs", FuseFolder, "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=0700,size=50%,nr_inodes=4096"},
	})
}
