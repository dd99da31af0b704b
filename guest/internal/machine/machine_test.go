package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNamesReplaceLinks(t *testing.T) {
	root, foreign := t.TempDir(), filepath.Join(t.TempDir(), "stub-resolv.conf")
	os.WriteFile(foreign, []byte("theirs"), 0o644)
	os.Mkdir(filepath.Join(root, "etc"), 0o755)
	os.Symlink(foreign, filepath.Join(root, "etc/resolv.conf"))
	n := Names{Address: "10.0.0.2", Hosts: map[string]string{"peer": "10.0.0.3", "api": "fd00::1"}, Nameservers: []string{"10.0.0.1", "1.1.1.1"}}
	for range 2 {
		if err := n.Apply(root); err != nil {
			t.Fatal(err)
		}
	}
	if text, _ := os.ReadFile(filepath.Join(root, "etc/resolv.conf")); string(text) != "nameserver 10.0.0.1\nnameserver 1.1.1.1\n" {
		t.Errorf("resolv.conf %q", text)
	}
	if text, _ := os.ReadFile(foreign); string(text) != "theirs" {
		t.Error("the link was followed")
	}
	if text, _ := os.ReadFile(filepath.Join(root, "etc/hosts")); !strings.HasSuffix(string(text), "fd00::1\tapi\n10.0.0.3\tpeer\n") {
		t.Errorf("hosts %q", text)
	}
	if entries, _ := os.ReadDir(filepath.Join(root, "etc")); len(entries) != 2 {
		t.Errorf("left over: %v", entries)
	}
}

func TestWithoutNameServersTheImagesChoiceStays(t *testing.T) {
	root := t.TempDir() // without /etc
	if err := (Names{}).Apply(root); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "etc/resolv.conf")); err == nil {
		t.Error("resolv.conf was written")
	}
}

func TestHostsNameTheMachine(t *testing.T) {
	if text := (Names{Hostname: "box", Address: "10.0.0.2"}).hostsFile(); !strings.Contains(text, "10.0.0.2\tbox\n") {
		t.Errorf("%q", text)
	}
	if text := (Names{Hostname: "box"}).hostsFile(); !strings.Contains(text, "127.0.1.1\tbox\n") {
		t.Errorf("%q", text)
	}
}

func TestNamesAreChecked(t *testing.T) {
	for _, bad := range []Names{
		{Hostname: "a b"}, {Hostname: strings.Repeat("x", 65)}, {Hosts: map[string]string{"": "1.1.1.1"}},
		{Hosts: map[string]string{"a": "b"}}, {Nameservers: []string{"8.8.8.8\nevil"}},
	} {
		if bad.Check() == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
	if err := (Names{Hostname: "box-1.example"}).Check(); err != nil {
		t.Error(err)
	}
}

func TestPhasesCountOnce(t *testing.T) {
	var p Phases
	p.Done("init")
	p.Done("modules")
	p.Done("init")
	list := p.List()
	if len(list) != 2 || list[0].Phase != "init" || list[1].Phase != "modules" || list[0].AtMS > list[1].AtMS || list[0].AtMS <= 0 {
		t.Errorf("%+v", list)
	}
}

func TestProcessesAreToldFromKernelThreads(t *testing.T) {
	if !inUserSpace("self") {
		t.Error("this is a process")
	}
	if !(kernel{}).anyProcess() {
		t.Error("there are processes")
	}
}

func TestUptimeIsTheKernels(t *testing.T) {
	text, _ := os.ReadFile("/proc/uptime")
	if Uptime() <= 0 || len(text) == 0 {
		t.Error(Uptime())
	}
}
