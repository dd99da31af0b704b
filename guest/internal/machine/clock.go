// Package machine is what the agent knows about, and does to, the machine as a
// whole: clocks, entropy, names, boot phases, figures, power.
package machine

import (
	"encoding/binary"
	"os"
	"syscall"
	"time"
	"unsafe"
)

const (
	clockRealtime = 0
	clockBoottime = 7

	rndAddEntropy = 0x40085203 // _IOW('R', 3, int[2])
	rndReseedCRNG = 0x5207     // _IO('R', 7)
)

// Uptime is the kernel's time since boot, suspensions included.
func Uptime() time.Duration {
	var ts syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&ts)), 0)
	return time.Duration(ts.Nano())
}

// SetClock sets the wall clock.
func SetClock(unixNS int64) error {
	ts := syscall.NsecToTimespec(unixNS)
	_, _, errno := syscall.Syscall(syscall.SYS_CLOCK_SETTIME, clockRealtime, uintptr(unsafe.Pointer(&ts)), 0)
	if errno != 0 {
		return os.NewSyscallError("clock_settime", errno)
	}
	return nil
}

// AddEntropy credits the bytes to the kernel's pool and makes the random number
// generator start anew from it, so that clones of one machine part ways.
func AddEntropy(seed []byte) error {
	device, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	// struct rand_pool_info: bits of entropy, bytes, the bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(8*len(seed)))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(seed)))
	info = append(info, seed...)
	if err := ioctl(device, rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); err != nil {
		return err
	}
	return ioctl(device, rndReseedCRNG, 0)
}

func ioctl(file *os.File, request, argument uintptr) error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, file.Fd(), request, argument)
	if errno != 0 {
		return os.NewSyscallError("ioctl", errno)
	}
	return nil
}
