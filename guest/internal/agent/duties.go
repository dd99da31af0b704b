package agent

import (
	"context"
	"maps"
	"net/http"
	"strconv"
	"time"

	"fused/internal/board"
	"fused/internal/daemon"
	"fused/internal/download"
	"fused/internal/fault"
	"fused/internal/healthcheck"
	"fused/internal/process"
	"fused/internal/setup"
)

// maxWait is how long GET /state may wait for news.
const maxWait = time.Minute

// duties are what an environment asks of its machine beside commands and files:
// docs/guest-protocol.md, section 6.
type duties struct {
	board  *board.Board
	setup  *setup.Keeper
	daemon *daemon.Supervisor
	health *healthcheck.Checker
}

func newDuties(config Config, resolve func(process.Request) (process.Spec, error)) *duties {
	b := board.New()
	return &duties{
		board: b,
		setup: setup.New(config.Folder, b.Changed),
		daemon: daemon.New(daemon.Config{
			Launcher: config.Launcher, Resolve: resolve, Folder: config.Folder, Limits: download.Usual, Pace: daemon.UsualPace,
			Changed: b.Changed,
		}),
		health: healthcheck.New(healthcheck.Config{Launcher: config.Launcher, Resolve: resolve, Changed: b.Changed}),
	}
}

// join adds what the setup says to what commands get.
func (d *duties) join(defaults process.Defaults) process.Defaults {
	env, workdir := d.setup.Defaults()
	if len(env) > 0 {
		joined := maps.Clone(env)
		for name, value := range defaults.Env {
			if _, own := env[name]; !own {
				joined[name] = value
			}
		}
		defaults.Env = joined
	}
	if workdir != "" {
		defaults.Workdir = workdir
	}
	return defaults
}

func (a *Agent) resolve(request process.Request) (process.Spec, error) {
	return request.Resolve(a.commandDefaults(), a.accounts)
}

func (a *Agent) dutyHandlers() map[string]handler {
	return map[string]handler{
		"GET /state":          a.state,
		"PUT /setup":          a.putSetup,
		"PUT /agent":          a.putDaemon,
		"GET /agent/output":   a.daemonOutput,
		"POST /agent/drain":   a.drainDaemon,
		"PUT /healthcheck":    a.putHealthcheck,
		"DELETE /healthcheck": a.deleteHealthcheck,
	}
}

type stateBody struct {
	Version int64               `json:"version"`
	SetupID string              `json:"setup_id,omitempty"`
	AgentID string              `json:"agent_id,omitempty"`
	Agent   *daemon.Status      `json:"agent,omitempty"`
	Health  *healthcheck.Status `json:"health,omitempty"`
}

func (a *Agent) sendState(w http.ResponseWriter) error {
	// First the version: what changes after it is told again.
	body := stateBody{Version: a.duties.board.Version(), SetupID: a.duties.setup.ID(), Health: a.duties.health.Status()}
	body.AgentID, body.Agent = a.duties.daemon.Status()
	return sendJSON(w, http.StatusOK, body)
}

// state answers at once, or when there is news.
func (a *Agent) state(w http.ResponseWriter, r *http.Request) error {
	after, err := number(r, "after", -1, 0, 1<<62)
	if err != nil {
		return err
	}
	waitMS, err := number(r, "wait_ms", 0, 0, maxWait.Milliseconds())
	if err != nil {
		return err
	}
	if waitMS > 0 && after >= 0 {
		ctx, cancel := gone(r)
		defer cancel()
		ctx, stop := context.WithTimeout(ctx, time.Duration(waitMS)*time.Millisecond)
		defer stop()
		a.duties.board.Wait(ctx, after)
	}
	return a.sendState(w)
}

// number reads a whole number from the query.
func number(r *http.Request, name string, otherwise, least, most int64) (int64, error) {
	text := r.URL.Query().Get(name)
	if text == "" {
		return otherwise, nil
	}
	value, err := strconv.ParseInt(text, 10, 64)
	if err != nil || value < least || value > most {
		return 0, fault.BadRequest(name, name+" must be a number between "+strconv.FormatInt(least, 10)+" and "+strconv.FormatInt(most, 10))
	}
	return value, nil
}

func (a *Agent) putSetup(w http.ResponseWriter, r *http.Request) error {
	var body setup.Body
	if err := decode(w, r, &body); err != nil {
		return err
	}
	if err := a.duties.setup.Apply(body); err != nil {
		return err
	}
	return a.sendState(w)
}

func (a *Agent) putDaemon(w http.ResponseWriter, r *http.Request) error {
	var order daemon.Order
	if err := decode(w, r, &order); err != nil {
		return err
	}
	if err := a.duties.daemon.Put(order); err != nil {
		return err
	}
	return a.sendState(w)
}

func (a *Agent) daemonOutput(w http.ResponseWriter, r *http.Request) error {
	return sendOutput(w, r, a.duties.daemon.Ring)
}

func (a *Agent) drainDaemon(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		TimeoutMS int64 `json:"timeout_ms"`
	}
	if err := decode(w, r, &body); err != nil {
		return err
	}
	ctx, cancel := gone(r)
	defer cancel()
	answer, err := a.duties.daemon.Drain(ctx, body.TimeoutMS)
	if err != nil {
		if ctx.Err() != nil {
			abort(r) // nobody is there to be told
		}
		return err
	}
	return sendJSON(w, http.StatusOK, answer)
}

func (a *Agent) putHealthcheck(w http.ResponseWriter, r *http.Request) error {
	var body healthcheck.Body
	if err := decode(w, r, &body); err != nil {
		return err
	}
	plan, err := body.Plan()
	if err != nil {
		return err
	}
	a.duties.health.Set(plan)
	return a.sendState(w)
}

func (a *Agent) deleteHealthcheck(w http.ResponseWriter, _ *http.Request) error {
	a.duties.health.Set(nil)
	return a.sendState(w)
}
