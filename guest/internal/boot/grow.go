package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"fused/internal/console"
)

const (
	// sectorSize is the unit of /sys/block/*/size, whatever the disk says.
	sectorSize = 512
	// resizeIoctl is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64) (linux/ext4.h).
	resizeIoctl = 0x40086610
	// The ext4 superblock: 1024 bytes at 1024. Blocks at 0x4 and 0x150 (high half),
	// log2 of the block size less 10 at 0x18, magic at 0x38.
	superblockAt, superblockSize = 1024, 1024
	ext4Magic                    = 0xEF53
)

// growOverlay makes the mounted private file system as large as its disk, which
// the host may have enlarged since the last start. A file system that does not
// grow is smaller than was asked for, and still what the user has: it is mounted.
func growOverlay(device, mounted string) {
	blocks, err := missingBlocks(device)
	if err == nil && blocks > 0 {
		err = resize(mounted, blocks)
		if err == nil {
			console.Printf("the file system of %s was enlarged to %d blocks", device, blocks)
		}
	}
	if err != nil {
		console.Printf("the file system of %s could not be enlarged: %v", device, err)
	}
}

// missingBlocks returns how many blocks the file system ought to have; 0 when it
// has them.
func missingBlocks(device string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 63)
	if err != nil {
		return 0, err
	}
	file, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	superblock := make([]byte, superblockSize)
	if _, err := file.ReadAt(superblock, superblockAt); err != nil {
		return 0, err
	}
	return wantedBlocks(superblock, sectors*sectorSize)
}

// wantedBlocks compares a superblock with the size of its disk.
func wantedBlocks(superblock []byte, size uint64) (uint64, error) {
	number := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(superblock[at:])) }
	shift := number(0x18) + 10
	if binary.LittleEndian.Uint16(superblock[0x38:]) != ext4Magic || shift > 16 {
		return 0, fmt.Errorf("no ext4 superblock")
	}
	has, wants := number(0x150)<<32|number(0x4), size>>shift
	if wants <= has {
		return 0, nil
	}
	return wants, nil
}

func resize(mounted string, blocks uint64) error {
	folder, err := os.Open(mounted)
	if err != nil {
		return err
	}
	defer folder.Close()
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, folder.Fd(), resizeIoctl, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return errno
	}
	return nil
}
