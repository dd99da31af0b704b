package login

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

var body = Body{
	HostKey: "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", HostPublicKey: "ssh-ed25519 AAAA",
	AuthorizedKeys: []string{"ssh-ed25519 BBBB a", "ssh-rsa CCCC b"},
}

func put(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func text(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestKeysAndUserArePlacedOnce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	put(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/bash", 0o644)
	put(t, filepath.Join(root, "etc/shadow"), "root:*:1::::::\n", 0o600)
	for range 2 {
		key, err := Place(root, body)
		if err != nil || key != body.HostPublicKey {
			t.Fatal(key, err)
		}
	}
	if got := text(t, filepath.Join(root, "etc/passwd")); got != "root:x:0:0:root:/root:/bin/bash\nnode:x:1000:1000::/home/node:/bin/sh\n" {
		t.Error(got)
	}
	if got := text(t, filepath.Join(root, "etc/microagent/authorized_keys")); got != "ssh-ed25519 BBBB a\nssh-rsa CCCC b\n" {
		t.Error(got)
	}
	for path, mode := range map[string]os.FileMode{
		"etc/ssh/ssh_host_ed25519_key": 0o600, "etc/ssh/ssh_host_ed25519_key.pub": 0o644, "etc/shadow": 0o600,
	} {
		if info, err := os.Stat(filepath.Join(root, path)); err != nil || info.Mode().Perm() != mode {
			t.Error(path, info, err)
		}
	}
	var stat syscall.Stat_t
	if err := syscall.Stat(filepath.Join(root, "home/node"), &stat); err != nil || stat.Uid != 1000 || stat.Gid != 1000 {
		t.Error(stat, err)
	}
}

func TestAnImagesOwnUserIsKept(t *testing.T) {
	root := t.TempDir()
	own := "node:x:1500:1500::/srv:/bin/zsh\n"
	put(t, filepath.Join(root, "etc/passwd"), own, 0o644)
	if err := ensureLine(filepath.Join(root, "etc/passwd"), "node:x:1000:1000::/home/node:/bin/sh", 0o644); err != nil {
		t.Fatal(err)
	}
	if got := text(t, filepath.Join(root, "etc/passwd")); got != own {
		t.Error(got)
	}
}

func TestALinkIsReplacedAndNotFollowed(t *testing.T) {
	root := t.TempDir()
	victim := filepath.Join(root, "victim")
	put(t, victim, "mine", 0o644)
	if err := os.Symlink(victim, filepath.Join(root, "key")); err != nil {
		t.Fatal(err)
	}
	if err := replace(filepath.Join(root, "key"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if text(t, victim) != "mine" || text(t, filepath.Join(root, "key")) != "new" {
		t.Error("the link was followed")
	}
}

func TestOnlyWholeLinesAreKeys(t *testing.T) {
	for _, bad := range []Body{
		{}, {HostKey: "x", HostPublicKey: "a\nb"},
		{HostKey: "x", HostPublicKey: "a", AuthorizedKeys: []string{"k\ncommand=\"rm\" k2"}},
		{HostKey: "x", HostPublicKey: "a", TrustedUserCAKeys: []string{" "}},
	} {
		if bad.Check() == nil {
			t.Errorf("%+v", bad)
		}
	}
	if err := body.Check(); err != nil {
		t.Error(err)
	}
}

func TestTheServerIsTheImagesOwn(t *testing.T) {
	root := t.TempDir()
	if Command(root, body) != nil {
		t.Error("there is no sshd")
	}
	put(t, filepath.Join(root, "usr/sbin/sshd"), "", 0o755)
	command := Command(root, body)
	if command[0] != "/usr/sbin/sshd" || !slices.Contains(command, "2222") || strings.Contains(strings.Join(command, " "), "TrustedUserCAKeys") {
		t.Error(command)
	}
	with := body
	with.TrustedUserCAKeys = []string{"ssh-ed25519 DDDD"}
	if !slices.Contains(Command(root, with), "TrustedUserCAKeys=/etc/microagent/trusted_user_ca_keys") {
		t.Error(with)
	}
}
