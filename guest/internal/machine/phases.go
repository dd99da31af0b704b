package machine

import (
	"sync"
)

// Phase is one step of the boot and the uptime at which it was finished.
type Phase struct {
	Phase string `json:"phase"`
	AtMS  int64  `json:"at_ms"`
}

// Phases records the boot.
type Phases struct {
	mu   sync.Mutex
	list []Phase
}

// Done records that a phase is finished; only the first time counts.
func (p *Phases) Done(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, known := range p.list {
		if known.Phase == name {
			return
		}
	}
	p.list = append(p.list, Phase{name, Uptime().Milliseconds()})
}

// List returns the phases in order.
func (p *Phases) List() []Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Phase{}, p.list...)
}
