package healthcheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"fused/internal/console"
	"fused/internal/process"
)

// lastWords is how much of a command's output a message repeats.
const lastWords = 200

// Config is what a checker works with.
type Config struct {
	Launcher *process.Launcher
	// Resolve finds program, user and folder of a command.
	Resolve func(process.Request) (process.Spec, error)
	// Changed is called when the verdict is another one.
	Changed func()
}

// Checker carries out one health check at a time.
type Checker struct {
	config Config

	turn sync.Mutex // held while one check takes another's place

	mu     sync.Mutex
	status *Status
	stop   context.CancelFunc
	over   chan struct{}
}

// New makes a checker that does nothing.
func New(config Config) *Checker { return &Checker{config: config} }

// Status is nil without a health check.
func (c *Checker) Status() *Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == nil {
		return nil
	}
	copied := *c.status
	return &copied
}

// Set begins a health check anew; nil ends it. When it returns, nothing of the
// one before is running.
func (c *Checker) Set(plan *Plan) {
	c.turn.Lock()
	defer c.turn.Unlock()
	c.mu.Lock()
	stop, over := c.stop, c.over
	c.mu.Unlock()
	if stop != nil {
		stop()
		<-over
	}
	c.mu.Lock()
	c.status, c.stop, c.over = nil, nil, nil
	if plan != nil {
		c.status = &Status{State: Starting, SinceMS: time.Now().UnixMilli()}
		ctx, cancel := context.WithCancel(context.Background())
		over := make(chan struct{})
		c.stop, c.over = cancel, over
		console.Go("health check", func() {
			defer close(over)
			c.loop(ctx, plan)
		})
	}
	c.mu.Unlock()
	c.config.Changed()
}

// Leave ends the health check without waiting for it: nothing more is found out.
func (c *Checker) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stop != nil {
		c.stop()
	}
}

func (c *Checker) loop(ctx context.Context, plan *Plan) {
	first := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		begun := time.Now()
		problem := c.check(ctx, plan)
		if ctx.Err() != nil {
			return
		}
		c.record(plan, problem, begun.Sub(first))
		timer.Reset(plan.Interval - time.Since(begun))
	}
}

func (c *Checker) record(plan *Plan, problem string, age time.Duration) {
	c.mu.Lock()
	before := *c.status
	after := plan.judge(before, problem, age, time.Now())
	c.status = &after
	c.mu.Unlock()
	if after.State != before.State {
		c.config.Changed()
	}
}

// check returns what is wrong, in words; "" for a pass.
func (c *Checker) check(ctx context.Context, plan *Plan) string {
	if plan.URL != "" {
		return get(ctx, plan)
	}
	return c.run(ctx, plan)
}

func get(ctx context.Context, plan *Plan) string {
	ctx, cancel := context.WithTimeout(ctx, plan.Timeout)
	defer cancel()
	client := &http.Client{
		Transport:     &http.Transport{DialContext: (&net.Dialer{}).DialContext, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, plan.URL, nil)
	if err != nil {
		return err.Error()
	}
	response, err := client.Do(request)
	if err != nil {
		var inURL *url.Error
		switch {
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return fmt.Sprintf("GET %s: no answer within %v", plan.URL, plan.Timeout)
		case errors.As(err, &inURL):
			err = inURL.Err
		}
		return fmt.Sprintf("GET %s: %v", plan.URL, err)
	}
	response.Body.Close()
	if response.StatusCode < 200 || response.StatusCode > 399 {
		return fmt.Sprintf("GET %s: status %d", plan.URL, response.StatusCode)
	}
	return ""
}

// run runs the command. Its time limit is the launcher's, which ends the whole
// tree.
func (c *Checker) run(ctx context.Context, plan *Plan) string {
	spec, err := c.config.Resolve(process.Request{Cmd: plan.Exec})
	if err != nil {
		return err.Error()
	}
	out := &process.Tail{Limit: lastWords}
	command, err := c.config.Launcher.Start(spec, process.Options{Timeout: plan.Timeout, Stdout: out.Write, Stderr: out.Write})
	if err != nil {
		return err.Error()
	}
	stop := context.AfterFunc(ctx, command.Kill)
	exit := command.Exit()
	stop()
	command.Kill() // what it leaves behind would pile up
	program := plan.Exec[0]
	switch {
	case exit.TimedOut:
		return fmt.Sprintf("%s was not done within %v%s", program, plan.Timeout, out.Words())
	case exit.Signal != "":
		return fmt.Sprintf("%s was ended by the signal %s%s", program, exit.Signal, out.Words())
	case exit.ExitCode != 0:
		return fmt.Sprintf("%s ended with exit code %d%s", program, exit.ExitCode, out.Words())
	}
	return ""
}
