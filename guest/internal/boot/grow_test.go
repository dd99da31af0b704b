package boot

import (
	"encoding/binary"
	"testing"
)

func TestOnlyASmallerFileSystemGrows(t *testing.T) {
	superblock := make([]byte, superblockSize)
	binary.LittleEndian.PutUint32(superblock[0x4:], 1<<18) // 1 GiB of 4 KiB blocks
	binary.LittleEndian.PutUint32(superblock[0x18:], 2)
	binary.LittleEndian.PutUint16(superblock[0x38:], ext4Magic)
	for size, want := range map[uint64]uint64{1 << 30: 0, 1 << 29: 0, 1<<30 + 4095: 0, 1<<30 + 4096: 1<<18 + 1, 3 << 30: 3 << 18} {
		if got, err := wantedBlocks(superblock, size); err != nil || got != want {
			t.Errorf("%d: %d %v", size, got, err)
		}
	}
	binary.LittleEndian.PutUint32(superblock[0x150:], 1)
	if got, err := wantedBlocks(superblock, 1<<40); err != nil || got != 0 {
		t.Error(got, err)
	}
	superblock[0x38] = 0
	if _, err := wantedBlocks(superblock, 1<<30); err == nil {
		t.Error("no ext4")
	}
}
