package machine

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"fused/internal/fault"
)

// Names is what the machine calls itself and others.
type Names struct {
	Hostname    string
	Address     string // the machine's own; "" without a network
	Hosts       map[string]string
	Nameservers []string
}

// Check refuses what would break the files that Apply writes.
func (n Names) Check() error {
	if n.Hostname != "" && !validName(n.Hostname) {
		return fault.BadRequest("hostname", "hostname must be 1 to 64 letters, digits, dots and dashes")
	}
	for name, address := range n.Hosts {
		if _, err := netip.ParseAddr(address); err != nil || !validName(name) {
			return fault.BadRequest("hosts", "hosts must map names to IP addresses")
		}
	}
	for _, server := range n.Nameservers {
		if _, err := netip.ParseAddr(server); err != nil {
			return fault.BadRequest("nameservers", "nameservers must be IP addresses")
		}
	}
	return nil
}

func validName(name string) bool {
	allowed := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_'
	}
	return name != "" && len(name) <= 64 && strings.IndexFunc(name, func(r rune) bool { return !allowed(r) }) < 0
}

// Apply sets the host name and writes /etc/hosts and, when there are name
// servers, /etc/resolv.conf below root.
func (n Names) Apply(root string) error {
	if n.Hostname != "" {
		if err := syscall.Sethostname([]byte(n.Hostname)); err != nil {
			return os.NewSyscallError("sethostname", err)
		}
	}
	if err := replaceFile(filepath.Join(root, "etc/hosts"), n.hostsFile()); err != nil {
		return err
	}
	if len(n.Nameservers) == 0 {
		return nil // the image's own choice stays
	}
	return replaceFile(filepath.Join(root, "etc/resolv.conf"), n.resolvFile())
}

func (n Names) hostsFile() string {
	var text strings.Builder
	text.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if n.Hostname != "" {
		text.WriteString(firstOf(n.Address, "127.0.1.1") + "\t" + n.Hostname + "\n")
	}
	for _, name := range slices.Sorted(maps.Keys(n.Hosts)) {
		text.WriteString(n.Hosts[name] + "\t" + name + "\n")
	}
	return text.String()
}

func (n Names) resolvFile() string {
	var text strings.Builder
	for _, server := range n.Nameservers {
		text.WriteString("nameserver " + server + "\n")
	}
	return text.String()
}

// replaceFile puts a new file in the place of whatever is there; writing
// through a symlink would change a file that belongs to somebody else.
func replaceFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if current, err := os.Readlink(path); err != nil || current == "" {
		if old, err := os.ReadFile(path); err == nil && string(old) == text {
			return nil
		}
	}
	temporary := path + ".fuse"
	if err := os.WriteFile(temporary, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
