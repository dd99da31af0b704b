package boot

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"unsafe"

	"fused/internal/machine"
)

// network brings up the loopback and the machine's one address, and writes the
// files that name things.
func (m *Machine) network() error {
	control, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("the kernel has no IPv4: %w", err)
	}
	defer syscall.Close(control)
	if err := raise(control, "lo"); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}
	if m.Params.Address.IsValid() {
		if err := m.address(control); err != nil {
			return err
		}
	}
	return m.name()
}

func (m *Machine) address(control int) error {
	device := virtioNetDevice("/sys/class/net")
	if device == "" {
		return errors.New("no virtio network device, but fuse.ip asks for one")
	}
	p := m.Params
	if err := configure(control, device, p); err != nil {
		return fmt.Errorf("network device %s: %w", device, err)
	}
	if !p.Gateway.IsValid() {
		return nil
	}
	if !p.Address.Contains(p.Gateway) {
		// A gateway beyond the prefix is reached through a route of its own.
		if err := addRoute(control, device, netip.PrefixFrom(p.Gateway, 32), netip.Addr{}); err != nil {
			return fmt.Errorf("route to the gateway %s: %w", p.Gateway, err)
		}
	}
	if err := addRoute(control, device, netip.MustParsePrefix("0.0.0.0/0"), p.Gateway); err != nil {
		return fmt.Errorf("default route by %s: %w", p.Gateway, err)
	}
	return nil
}

func (m *Machine) name() error {
	m.Names = machine.Names{Hostname: m.Params.Hostname, Nameservers: m.Params.DNS}
	if m.Params.Address.IsValid() {
		m.Names.Address = m.Params.Address.Addr().String()
	}
	if err := m.Names.Check(); err != nil {
		return err
	}
	if m.Names.Hostname == "" {
		syscall.Sethostname([]byte("localhost")) // "(none)" irritates programs
	}
	if err := m.Names.Apply("/"); err != nil {
		return fmt.Errorf("write the host files: %w", err)
	}
	return nil
}

// virtioNetDevice returns the first network device whose driver is virtio_net.
func virtioNetDevice(sysNet string) string {
	names, _ := filepath.Glob(filepath.Join(sysNet, "*"))
	slices.Sort(names)
	for _, path := range names {
		driver, err := os.Readlink(filepath.Join(path, "device/driver"))
		if err == nil && filepath.Base(driver) == "virtio_net" {
			return filepath.Base(path)
		}
	}
	return ""
}

// ifreq is struct ifreq: a name and a union of 24 bytes.
type ifreq struct {
	name  [16]byte
	value [24]byte
}

func newIfreq(device string) *ifreq {
	r := &ifreq{}
	copy(r.name[:15], device)
	return r
}

func (r *ifreq) call(control int, request uintptr) error {
	return ioctl(control, request, unsafe.Pointer(r))
}

func ioctl(fd int, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

func raise(control int, device string) error {
	r := newIfreq(device)
	if err := r.call(control, syscall.SIOCGIFFLAGS); err != nil {
		return err
	}
	flags := (*uint16)(unsafe.Pointer(&r.value))
	*flags |= syscall.IFF_UP | syscall.IFF_RUNNING
	return r.call(control, syscall.SIOCSIFFLAGS)
}

func configure(control int, device string, p Params) error {
	r := newIfreq(device)
	if p.MTU > 0 {
		*(*int32)(unsafe.Pointer(&r.value)) = int32(p.MTU)
		if err := r.call(control, syscall.SIOCSIFMTU); err != nil {
			return fmt.Errorf("MTU %d: %w", p.MTU, err)
		}
	}
	r = newIfreq(device)
	*(*syscall.RawSockaddrInet4)(unsafe.Pointer(&r.value)) = sockaddr(p.Address.Addr())
	if err := r.call(control, syscall.SIOCSIFADDR); err != nil {
		return fmt.Errorf("address %s: %w", p.Address, err)
	}
	r = newIfreq(device)
	*(*syscall.RawSockaddrInet4)(unsafe.Pointer(&r.value)) = sockaddr(netmask(p.Address.Bits()))
	if err := r.call(control, syscall.SIOCSIFNETMASK); err != nil {
		return fmt.Errorf("netmask /%d: %w", p.Address.Bits(), err)
	}
	return raise(control, device)
}

func sockaddr(address netip.Addr) syscall.RawSockaddrInet4 {
	sa := syscall.RawSockaddrInet4{Family: syscall.AF_INET}
	if address.IsValid() {
		sa.Addr = address.As4()
	}
	return sa
}

func netmask(bits int) netip.Addr {
	return netip.AddrFrom4([4]byte(net.CIDRMask(bits, 32)))
}

// rtentry is struct rtentry on 64-bit kernels.
type rtentry struct {
	_       uint64
	dst     syscall.RawSockaddrInet4
	gateway syscall.RawSockaddrInet4
	genmask syscall.RawSockaddrInet4
	flags   uint16
	_       int16
	_       uint64
	_       uint64
	metric  int16
	dev     *byte
	mtu     uint64
	window  uint64
	irtt    uint16
}

// addRoute adds a route; an invalid gateway means "directly reachable".
func addRoute(control int, device string, to netip.Prefix, gateway netip.Addr) error {
	name := append([]byte(device), 0)
	route := rtentry{
		dst: sockaddr(to.Masked().Addr()), gateway: sockaddr(gateway), genmask: sockaddr(netmask(to.Bits())),
		flags: syscall.RTF_UP, dev: &name[0],
	}
	if gateway.IsValid() {
		route.flags |= syscall.RTF_GATEWAY
	}
	if to.Bits() == 32 {
		route.flags |= syscall.RTF_HOST
	}
	return ioctl(control, syscall.SIOCADDRT, unsafe.Pointer(&route))
}
