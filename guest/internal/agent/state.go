package agent

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"os"
	"time"

	"fused/internal/console"
	"fused/internal/login"
	"fused/internal/machine"
	"fused/internal/process"
)

type healthBody struct {
	OK         bool            `json:"ok"`
	Protocol   string          `json:"protocol"`
	Version    string          `json:"version"`
	Nonce      string          `json:"nonce"`
	BootID     string          `json:"boot_id"`
	UptimeMS   int64           `json:"uptime_ms"`
	TimeUnixNS int64           `json:"time_unix_ns"`
	Hostname   string          `json:"hostname"`
	Boot       []machine.Phase `json:"boot"`
	Processes  int             `json:"processes"`
	Login      *login.Status   `json:"login,omitempty"`
}

func (a *Agent) health(w http.ResponseWriter, _ *http.Request) error {
	hostname, _ := os.Hostname()
	a.mu.Lock()
	var people *login.Status
	if a.login.HostPublicKey != "" {
		copied := a.login
		people = &copied
	}
	a.mu.Unlock()
	return sendJSON(w, http.StatusOK, healthBody{
		OK: true, Protocol: Protocol, Version: a.config.Version, Nonce: a.config.Nonce, BootID: machine.BootID(),
		UptimeMS: machine.Uptime().Milliseconds(), TimeUnixNS: time.Now().UnixNano(), Hostname: hostname,
		Boot: a.config.Phases.List(), Processes: a.config.Launcher.Running(),
		Login: people,
	})
}

func (a *Agent) metrics(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4")
	_, err := w.Write([]byte(machine.Metrics(a.config.Launcher.Running(), int(a.connections.Load()))))
	return err
}

// configureBody: a field that is absent leaves what it is about unchanged.
type configureBody struct {
	Generation  int64             `json:"generation"`
	TimeUnixNS  *int64            `json:"time_unix_ns"`
	Hostname    *string           `json:"hostname"`
	Env         map[string]string `json:"env"`
	Image       *imageBody        `json:"image"`
	Entropy     *[]byte           `json:"entropy_b64"`
	Nameservers []string          `json:"nameservers"`
	Hosts       map[string]string `json:"hosts"`
	Login       *login.Body       `json:"login"`
}

type imageBody struct {
	Env     map[string]string `json:"env"`
	Workdir string            `json:"workdir"`
	User    string            `json:"user"`
	Command []string          `json:"command"`
}

// configure applies a body once: a retry of the same one must not turn the
// clock back.
func (a *Agent) configure(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var wanted configureBody
	if err := parse(body, &wanted); err != nil {
		return err
	}
	if err := a.applyOnce(sha256.Sum256(body), wanted); err != nil {
		return err
	}
	return a.health(w, r)
}

func (a *Agent) applyOnce(digest [32]byte, wanted configureBody) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if digest == a.applied {
		return nil
	}
	names := a.mergeNames(wanted)
	if err := names.Check(); err != nil {
		return err
	}
	if wanted.Login != nil {
		if err := wanted.Login.Check(); err != nil {
			return err
		}
	}
	if err := a.applyToMachine(wanted, names); err != nil {
		return err
	}
	a.names = names
	if wanted.Image != nil {
		a.defaults.ImageEnv, a.defaults.Workdir, a.defaults.User = wanted.Image.Env, wanted.Image.Workdir, wanted.Image.User
		a.defaults.Command = wanted.Image.Command
	}
	if wanted.Env != nil {
		a.defaults.Env = wanted.Env
	}
	a.applied = digest
	a.config.Phases.Done("configured")
	return nil
}

func (a *Agent) mergeNames(wanted configureBody) machine.Names {
	names := a.names
	if wanted.Hostname != nil {
		names.Hostname = *wanted.Hostname
	}
	if wanted.Nameservers != nil {
		names.Nameservers = wanted.Nameservers
	}
	if wanted.Hosts != nil {
		names.Hosts = wanted.Hosts
	}
	return names
}

// applyToMachine: entropy first, because whatever comes later may draw from it.
func (a *Agent) applyToMachine(wanted configureBody, names machine.Names) error {
	if !a.config.Owned {
		return nil
	}
	if wanted.Entropy != nil && len(*wanted.Entropy) > 0 {
		if err := machine.AddEntropy(*wanted.Entropy); err != nil {
			return fmt.Errorf("add entropy: %w", err)
		}
	}
	if wanted.TimeUnixNS != nil {
		if err := machine.SetClock(*wanted.TimeUnixNS); err != nil {
			return err
		}
	}
	if wanted.Login != nil {
		if err := a.letIn(*wanted.Login); err != nil {
			return err
		}
	}
	if wanted.Hostname == nil && wanted.Nameservers == nil && wanted.Hosts == nil {
		return nil
	}
	return names.Apply("/")
}

// commandDefaults is what commands get beside their request.
func (a *Agent) commandDefaults() process.Defaults {
	a.mu.Lock()
	defaults := a.defaults
	a.mu.Unlock()
	return a.duties.join(defaults)
}

func (a *Agent) shutdown(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		// A restart is also how a machine is switched off, so both are one.
		Reboot bool `json:"reboot"`
	}
	if err := decode(w, r, &body); err != nil {
		return err
	}
	send(w, http.StatusAccepted, []byte("{}"))
	http.NewResponseController(w).Flush()
	console.Go("shutdown", a.End)
	return nil
}
