package agent

import (
	"sync"
	"time"

	"fused/internal/console"
	"fused/internal/machine"
)

// End ends what goes on by itself, and the machine. It happens once, whoever asks.
func (a *Agent) End() {
	a.ending.Do(func() {
		if a.config.Owned {
			a.leave()
		} else {
			a.stop()
		}
		a.config.Shutdown()
	})
}

// leave lets nothing be started any more, and waits for nothing: the machine's
// end tells every process, and has one deadline for them all.
func (a *Agent) leave() {
	// What ends may have to write. A freeze that is just being made holds this up for as long as it takes.
	console.Go("thaw", func() { a.freezer.Thaw() })
	a.duties.health.Leave()
	a.duties.daemon.Leave()
	a.sshd.Leave()
}

// stop ends what the agent has started by itself, all at the same time: an
// ordinary process may not tell others to end.
func (a *Agent) stop() {
	killAt := time.Now().Add(machine.TermGrace)
	var all sync.WaitGroup
	for _, end := range []func(){
		func() { a.duties.health.Set(nil) },
		func() { a.duties.daemon.Stop(killAt) },
		func() { a.sshd.Stop(killAt) },
	} {
		all.Go(end)
	}
	all.Wait()
}
