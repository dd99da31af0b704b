package boot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParams(t *testing.T) {
	p, err := ParseParams("console=ttyS0 quiet fuse.nonce=00ff fuse.ip=10.1.2.3/29,10.1.2.1,1400 fuse.dns=10.1.2.1,1.1.1.1 fuse.hostname=box other.ip=x\n")
	if err != nil {
		t.Fatal(err)
	}
	if p.Nonce != "00ff" || p.Address.String() != "10.1.2.3/29" || p.Gateway.String() != "10.1.2.1" || p.MTU != 1400 ||
		strings.Join(p.DNS, " ") != "10.1.2.1 1.1.1.1" || p.Hostname != "box" {
		t.Errorf("%+v", p)
	}
	p, err = ParseParams("fuse.ip=10.0.0.2/32")
	if err != nil || p.Gateway.IsValid() || p.MTU != 0 {
		t.Errorf("%+v %v", p, err)
	}
	if p, err = ParseParams(""); err != nil || p.Address.IsValid() {
		t.Errorf("%+v %v", p, err)
	}
	for _, bad := range []string{"fuse.ip=", "fuse.ip=10.0.0.2", "fuse.ip=fe80::1/64", "fuse.ip=10.0.0.2/24,gw", "fuse.ip=10.0.0.2/24,10.0.0.1,big", "fuse.dns=dns.example"} {
		if _, err := ParseParams(bad); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// sysfs makes a folder per path and writes text into the file.
func sysfs(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range files {
		full := filepath.Join(root, path)
		os.MkdirAll(filepath.Dir(full), 0o755)
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFindDisks(t *testing.T) {
	cases := []struct {
		name  string
		disks map[string]string
		want  diskPair
		fails bool
	}{
		{"by serial, in any order", map[string]string{"vda/serial": "overlay", "vdb/serial": "image\n"}, diskPair{"/dev/vdb", "/dev/vda"}, false},
		{"no overlay", map[string]string{"vda/serial": "image"}, diskPair{"/dev/vda", ""}, false},
		{"none", map[string]string{"sr0/size": "0"}, diskPair{}, false},
		{"foreign disk beside", map[string]string{"vda/serial": "data", "vdb/serial": "image", "vdc/serial": "overlay"}, diskPair{"/dev/vdb", "/dev/vdc"}, false},
		{"firecracker's own serials", map[string]string{"vda/serial": "2053000123", "vdb/serial": "2053000124"}, diskPair{"/dev/vda", "/dev/vdb"}, false},
		{"image missing", map[string]string{"vda/serial": "overlay"}, diskPair{}, true},
	}
	for _, c := range cases {
		got, err := findDisks(sysfs(t, c.disks))
		if (err != nil) != c.fails || (err == nil && got != c.want) {
			t.Errorf("%s: %+v %v", c.name, got, err)
		}
	}
}

func TestNamedPort(t *testing.T) {
	root := sysfs(t, map[string]string{"vport0p1/name": "other\n", "vport1p3/name": "fuse.agent\n", "vport2p0/dev": "1"})
	if got := namedPort(root); got != "/dev/vport1p3" {
		t.Errorf("got %q", got)
	}
	if got := namedPort(t.TempDir()); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestVirtioNetDevice(t *testing.T) {
	root := t.TempDir()
	for name, driver := range map[string]string{"eth0": "e1000", "eth1": "virtio_net", "eth2": "virtio_net"} {
		os.MkdirAll(filepath.Join(root, name, "device"), 0o755)
		os.Symlink("../../drivers/"+driver, filepath.Join(root, name, "device/driver"))
	}
	os.Mkdir(filepath.Join(root, "lo"), 0o755)
	if got := virtioNetDevice(root); got != "eth1" {
		t.Errorf("got %q", got)
	}
}

func TestModules(t *testing.T) {
	if err := loadModules(t.TempDir()); err != nil {
		t.Errorf("no list is no error: %v", err)
	}
	dir := sysfs(t, map[string]string{"order": "missing.ko\n"})
	if err := loadModules(dir); err == nil || !strings.Contains(err.Error(), "missing.ko") {
		t.Errorf("got %v", err)
	}
	dir = sysfs(t, map[string]string{"order": "broken.ko\n", "broken.ko": "no module"})
	if err := loadModules(dir); err == nil || !strings.Contains(err.Error(), "broken.ko") {
		t.Errorf("got %v", err)
	}
}

func TestDeletingTheInitramfsStaysOnItsFileSystem(t *testing.T) {
	root := sysfs(t, map[string]string{"init": "x", "modules/a.ko": "x"})
	os.Symlink("/proc", filepath.Join(root, "link"))
	deleteInitramfs(root)
	if left, _ := os.ReadDir(root); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := os.Stat("/proc/self"); err != nil {
		t.Error("followed the link")
	}
}
