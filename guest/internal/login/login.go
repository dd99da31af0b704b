// Package login lets people in by SSH: it writes the keys that the host has made
// and collected, makes sure of the user, and says how the image's sshd is run.
// docs/guest-protocol.md, section 4, `login` of POST /configure.
package login

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"fused/internal/fault"
)

const (
	// User is who people log in as; root works with the same keys.
	User = "node"
	// id is the user's and group's number, whatever the image calls them.
	id = 1000
	// Port is where sshd listens.
	Port = "2222"

	hostKey        = "/etc/ssh/ssh_host_ed25519_key"
	authorizedKeys = "/etc/microagent/authorized_keys"
	userCAKeys     = "/etc/microagent/trusted_user_ca_keys"
	server         = "/usr/sbin/sshd"
	home           = "/home/" + User
)

// Body is `login` of POST /configure.
type Body struct {
	HostKey           string   `json:"host_key"`
	HostPublicKey     string   `json:"host_public_key"`
	AuthorizedKeys    []string `json:"authorized_keys"`
	TrustedUserCAKeys []string `json:"trusted_user_ca_keys"`
}

// Status is `login` of the answer.
type Status struct {
	// HostPublicKey is what is on the disk.
	HostPublicKey string `json:"host_public_key"`
	// Served says that the image has an sshd, which was started.
	Served bool `json:"served"`
}

// Check refuses what would put other lines into the files.
func (b Body) Check() error {
	if b.HostKey == "" || b.HostPublicKey == "" || strings.ContainsAny(b.HostPublicKey, "\n\r\x00") {
		return fault.BadRequest("login.host_key", "login needs a host key and its public half on one line")
	}
	for _, lines := range [][]string{b.AuthorizedKeys, b.TrustedUserCAKeys} {
		for _, line := range lines {
			if strings.TrimSpace(line) == "" || strings.ContainsAny(line, "\n\r\x00") {
				return fault.BadRequest("login", "every key is one line that is not empty")
			}
		}
	}
	return nil
}

// Place writes keys and user below root and returns the public host key as the
// disk has it. Idempotent.
func Place(root string, b Body) (string, error) {
	files := []struct {
		path, text string
		mode       fs.FileMode
	}{
		{hostKey, b.HostKey, 0o600},
		{hostKey + ".pub", b.HostPublicKey + "\n", 0o644},
		{authorizedKeys, lines(b.AuthorizedKeys), 0o644},
		{userCAKeys, lines(b.TrustedUserCAKeys), 0o644},
	}
	for _, file := range files {
		if err := replace(filepath.Join(root, file.path), []byte(file.text), file.mode); err != nil {
			return "", err
		}
	}
	if err := ensureUser(root); err != nil {
		return "", err
	}
	found, err := os.ReadFile(filepath.Join(root, hostKey+".pub"))
	return strings.TrimSpace(string(found)), err
}

// Command is the argv of the image's sshd; nil where there is none. Its own
// configuration does not count: images bring many, for servers that boot.
func Command(root string, b Body) []string {
	if info, err := os.Stat(filepath.Join(root, server)); err != nil || info.IsDir() {
		return nil
	}
	options := []string{
		"HostKey=" + hostKey, "AuthorizedKeysFile=" + authorizedKeys, "PidFile=none", "UsePAM=no",
		"PasswordAuthentication=no", "KbdInteractiveAuthentication=no", "PermitRootLogin=prohibit-password",
		"Subsystem=sftp internal-sftp", "PrintMotd=no", "AcceptEnv=LANG LC_*", "UseDNS=no",
	}
	if len(b.TrustedUserCAKeys) > 0 {
		options = append(options, "TrustedUserCAKeys="+userCAKeys)
	}
	command := []string{server, "-D", "-e", "-f", "/dev/null", "-p", Port}
	for _, option := range options {
		command = append(command, "-o", option)
	}
	return command
}

func lines(keys []string) string {
	if len(keys) == 0 {
		return ""
	}
	return strings.Join(keys, "\n") + "\n"
}

// ensureUser adds the user to the image's lists where it is not there.
func ensureUser(root string) error {
	shell := "/bin/sh"
	if _, err := os.Stat(filepath.Join(root, "bin/bash")); err == nil {
		shell = "/bin/bash"
	}
	entries := []struct {
		path, line string
		mode       fs.FileMode
	}{
		{"/etc/passwd", User + ":x:1000:1000::" + home + ":" + shell, 0o644},
		{"/etc/group", User + ":x:1000:", 0o644},
		// A star is no password, and no locked account either.
		{"/etc/shadow", User + ":*:19000:0:99999:7:::", 0o640},
	}
	for _, entry := range entries {
		if err := ensureLine(filepath.Join(root, entry.path), entry.line, entry.mode); err != nil {
			return err
		}
	}
	// sshd gives up its rights in there.
	if err := ensureFolder(filepath.Join(root, "/run/sshd"), 0o755, 0); err != nil {
		return err
	}
	return ensureFolder(filepath.Join(root, home), 0o755, id)
}

// ensureLine adds a line to a list of accounts that has none of its name.
func ensureLine(path, line string, mode fs.FileMode) error {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	name, _, _ := strings.Cut(line, ":")
	for known := range strings.Lines(string(text)) {
		if strings.HasPrefix(known, name+":") {
			return nil
		}
	}
	if len(text) > 0 && !bytes.HasSuffix(text, []byte("\n")) {
		text = append(text, '\n')
	}
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	return replace(path, append(text, line+"\n"...), mode)
}

func ensureFolder(path string, mode fs.FileMode, owner int) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(path, mode); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return os.Chown(path, owner, owner)
}

// replace puts a whole new file in the place of whatever is there: half a key
// after a crash would lock everybody out. Links are replaced, not followed.
func replace(path string, text []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temporary := path + ".fuse"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	// The process's umask is not to decide about keys.
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		os.Remove(temporary)
	}
	return err
}
