// Package daemon supervises the user's daemon: fetches it, starts it, starts it
// again, drains it. docs/guest-protocol.md, sections 6.3 to 6.5.
package daemon

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"

	"fused/internal/download"
	"fused/internal/fault"
	"fused/internal/setup"
)

// When a daemon is started again.
const (
	Always    = "always"
	OnFailure = "on-failure"
	Never     = "never"
)

// Order is what PUT /agent takes.
type Order struct {
	ID           string            `json:"id"`
	Command      []string          `json:"command"`
	Env          map[string]string `json:"env"`
	DownloadURL  string            `json:"download_url"`
	SHA256       string            `json:"sha256"`
	DrainCommand []string          `json:"drain_command"`
	Restart      string            `json:"restart"`
}

// complete checks the order and fills in what is absent. program is where a
// downloaded daemon lies.
func (o *Order) complete(program string) error {
	if err := setup.CheckID(o.ID); err != nil {
		return err
	}
	if o.Restart == "" {
		o.Restart = Always
	}
	if o.Restart != Always && o.Restart != OnFailure && o.Restart != Never {
		return fault.BadRequest("restart", "restart must be always, on-failure or never")
	}
	if err := o.checkDownload(program); err != nil {
		return err
	}
	if len(o.Command) == 0 {
		if o.DownloadURL == "" {
			return fault.BadRequest("command", "give a command, a download_url, or both")
		}
		o.Command = []string{program}
	}
	for field, words := range map[string][]string{"command": o.Command, "drain_command": o.DrainCommand} {
		for i, word := range words {
			if strings.ContainsRune(word, 0) || (i == 0 && word == "") {
				return fault.BadRequest(field, field+" must begin with a program's name and not contain NUL")
			}
		}
	}
	for name, value := range o.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return fault.BadRequest("env", "env has a name or value that no process can have")
		}
	}
	return nil
}

func (o *Order) checkDownload(program string) error {
	if o.DownloadURL != "" {
		if program == "" {
			return fault.New("not_supported", "this agent has no folder for a downloaded daemon; it does not run as a machine's first process")
		}
		if err := download.CheckURL(o.DownloadURL); err != nil {
			return err
		}
	}
	if o.SHA256 == "" {
		return nil
	}
	o.SHA256 = strings.ToLower(o.SHA256)
	if digest, err := hex.DecodeString(o.SHA256); err != nil || len(digest) != 32 {
		return fault.BadRequest("sha256", "sha256 must be 64 hexadecimal digits")
	}
	return nil
}

// credentials are the variables that tell a daemon where it finds what the setup
// has brought. They are read at each start, so that they are those of the
// present setup.
func credentials(folder string) map[string]string {
	env := map[string]string{}
	if folder == "" {
		return env
	}
	path := func(name string) string { return filepath.Join(folder, name) }
	set := func(name, value string) {
		if value != "" && !strings.ContainsRune(value, 0) {
			env[name] = value
		}
	}
	if token, err := os.ReadFile(path("auth-token")); err == nil {
		set("FUSE_AUTH_TOKEN", strings.TrimRight(string(token), "\r\n"))
		env["FUSE_AUTH_TOKEN_FILE"] = path("auth-token")
	}
	if text, err := os.ReadFile(path("gateway.json")); err == nil {
		var gateway struct{ URL, Token string }
		if json.Unmarshal(text, &gateway) == nil {
			set("FUSE_GATEWAY_URL", gateway.URL)
			set("FUSE_GATEWAY_TOKEN", gateway.Token)
		}
	}
	for name, file := range map[string]string{"FUSE_SECRETS_FILE": "secrets.json", "FUSE_MANIFEST_FILE": "manifest.json"} {
		if _, err := os.Stat(path(file)); err == nil {
			env[name] = path(file)
		}
	}
	return env
}
