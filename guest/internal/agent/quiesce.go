package agent

import (
	"net/http"
	"time"

	"fused/internal/console"
	"fused/internal/fault"
)

// Longest that a host may hold the disks still. What it copies in that time is
// what has changed since a first pass.
const maxQuiesceMS = 60_000

// quiesce freezes the machine's disks for a bounded time.
func (a *Agent) quiesce(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		LimitMS int64 `json:"limit_ms"`
	}
	if err := decode(w, r, &body); err != nil {
		return err
	}
	if body.LimitMS < 1 || body.LimitMS > maxQuiesceMS {
		return fault.BadRequest("limit_ms", "limit_ms must be 1 to 60000")
	}
	ctx, cancel := gone(r)
	defer cancel()
	began := time.Now()
	if err := a.freezer.Freeze(time.Duration(body.LimitMS) * time.Millisecond); err != nil {
		return fault.New("not_supported", "the disks cannot be frozen: "+err.Error())
	}
	if ctx.Err() != nil {
		a.freezer.Thaw()
		abort(r) // nobody is there to copy anything
	}
	return sendJSON(w, http.StatusOK, map[string]int64{"took_ms": time.Since(began).Milliseconds()})
}

// thaw ends a freeze. What the host has copied is of one moment only if the
// answer says that the disks were still until now.
func (a *Agent) thaw(w http.ResponseWriter, _ *http.Request) error {
	was := a.freezer.Thaw()
	if !was {
		console.Printf("nothing was frozen any more")
	}
	return sendJSON(w, http.StatusOK, map[string]bool{"was_frozen": was})
}
