package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"fused/internal/account"
	"fused/internal/daemon"
	"fused/internal/download"
	"fused/internal/login"
	"fused/internal/process"
)

// newSSHD is who looks after the image's sshd. It runs as root, whoever the
// image's commands run as.
func newSSHD(config Config, accounts account.Database) *daemon.Supervisor {
	return daemon.New(daemon.Config{
		Launcher: config.Launcher,
		Resolve: func(request process.Request) (process.Spec, error) {
			request.User, request.Cwd = "root", "/"
			return request.Resolve(process.Defaults{}, accounts)
		},
		Limits: download.Usual, Pace: daemon.UsualPace, Changed: func() {},
	})
}

// letIn places keys and user and starts the image's sshd, where it has one.
func (a *Agent) letIn(body login.Body) error {
	found, err := login.Place("/", body)
	if err != nil {
		return fmt.Errorf("write the keys for logging in: %w", err)
	}
	a.login = login.Status{HostPublicKey: found}
	command := login.Command("/", body)
	if command == nil {
		return nil
	}
	// Another set of keys is another server.
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(text)
	err = a.sshd.Put(daemon.Order{ID: "sshd-" + hex.EncodeToString(digest[:8]), Command: command})
	a.login.Served = err == nil
	return err
}
