package healthcheck

import "time"

// What a health check says.
const (
	Starting = "starting"
	Passing  = "passing"
	Failing  = "failing"
)

// Status is the verdict as GET /state shows it.
type Status struct {
	State    string `json:"state"`
	SinceMS  int64  `json:"since_ms"`
	Failures int    `json:"failures"` // in a row
	Message  string `json:"message"`
}

// judge returns the verdict after one more check; problem is "" for a pass. age
// is the time since the first check began.
func (p *Plan) judge(before Status, problem string, age time.Duration, now time.Time) Status {
	after := before
	switch {
	case problem == "":
		after = Status{State: Passing, SinceMS: before.SinceMS}
	case before.State == Starting && age < p.StartPeriod:
		after.Message = problem
	default:
		after.Failures++
		after.Message = problem
		if after.Failures >= p.Retries {
			after.State = Failing
		}
	}
	if after.State != before.State {
		after.SinceMS = now.UnixMilli()
	}
	return after
}
