package process

import (
	"testing"

	"fused/internal/account"
)

// TestNothingIsInterpolated: what looks like shell reaches a command as it was
// written, argument by argument and variable by variable.
func TestNothingIsInterpolated(t *testing.T) {
	literal := "a b; $HOME ${X} $$ `id` \"q\" 'r' \\ *\n%s"
	each(t, func(t *testing.T, l *Launcher) {
		r := start(t, l, Request{Cmd: []string{"printf", "<%s>", literal, "", "-x"}})
		if exit := r.finish(t); exit.ExitCode != 0 || r.out.String() != "<"+literal+"><><-x>" {
			t.Errorf("arguments became %q", r.out.String())
		}
		r = start(t, l, Request{Cmd: []string{"printenv", "A"}, Env: map[string]string{"A": literal, "X": "no"}})
		if exit := r.finish(t); exit.ExitCode != 0 || r.out.String() != literal+"\n" {
			t.Errorf("the variable became %q", r.out.String())
		}
	})
	// Nor do the defaults of image and host know each other's variables.
	defaults := Defaults{ImageEnv: map[string]string{"B": "$A"}, Env: map[string]string{"A": "$B${B}"}}
	request := Request{Cmd: []string{"true"}}
	spec, err := request.Resolve(defaults, account.System)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, entry := range spec.Env {
		found[entry] = true
	}
	if !found["A=$B${B}"] || !found["B=$A"] {
		t.Errorf("environment %q", spec.Env)
	}
}
