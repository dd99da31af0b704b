// Package agent serves the routes of docs/guest-protocol.md, section 4, on any
// listener: the multiplexer's, vsock's or, in tests, a Unix socket's.
package agent

import (
	"context"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"fused/internal/account"
	"fused/internal/console"
	"fused/internal/daemon"
	"fused/internal/fault"
	"fused/internal/freeze"
	"fused/internal/login"
	"fused/internal/machine"
	"fused/internal/process"
)

// Protocol is what the daemon checks: only another major number is refused.
const Protocol = "1.2"

// Config is what the agent needs to know about where it runs.
type Config struct {
	Version  string
	Nonce    string
	Phases   *machine.Phases
	Names    machine.Names
	Launcher *process.Launcher
	// Owned says that the machine is ours: clock, names and power may be
	// changed. False when running as an ordinary process.
	Owned bool
	// Shutdown ends the machine, and where it is ours all its processes, too.
	Shutdown func()
	// Disks are the paths of the mounted file systems that a snapshot is taken
	// of; none for an ordinary process.
	Disks []string
	// Folder is a tmpfs for the setup's secrets; "": there is none.
	Folder string
}

// Agent is the state behind the routes.
type Agent struct {
	config      Config
	accounts    account.Database
	table       *process.Table
	duties      *duties
	freezer     *freeze.Freezer
	sshd        *daemon.Supervisor
	routes      *http.ServeMux
	connections atomic.Int64

	mu       sync.Mutex
	names    machine.Names
	defaults process.Defaults
	applied  [32]byte // digest of the last configure body
	login    login.Status

	ending sync.Once
}

// New makes an agent.
func New(config Config) *Agent {
	a := &Agent{
		config: config, accounts: account.System, table: process.NewTable(config.Launcher), names: config.Names,
		routes: http.NewServeMux(),
	}
	a.duties = newDuties(config, a.resolve)
	a.freezer = freeze.New(config.Disks)
	a.sshd = newSSHD(config, a.accounts)
	handlers := a.handlers()
	maps.Copy(handlers, a.dutyHandlers())
	for pattern, handler := range handlers {
		a.routes.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := handler(w, r); err != nil {
				sendFault(w, r, err)
			}
		})
	}
	return a
}

// handler answers a request; an error that it returns is sent as a fault, so it
// must not have written anything yet.
type handler func(w http.ResponseWriter, r *http.Request) error

func (a *Agent) handlers() map[string]handler {
	return map[string]handler{
		"GET /health":                  a.health,
		"POST /configure":              a.configure,
		"POST /exec":                   a.exec,
		"GET /exec":                    a.interactive,
		"POST /processes":              a.startProcess,
		"GET /processes":               a.listProcesses,
		"GET /processes/{pid}":         a.showProcess,
		"GET /processes/{pid}/output":  a.processOutput,
		"POST /processes/{pid}/signal": a.signalProcess,
		"POST /processes/{pid}/stdin":  a.feedProcess,
		"GET /files":                   a.readFile, // and HEAD
		"PUT /files":                   a.writeFile,
		"PATCH /files":                 a.patchFile,
		"DELETE /files":                a.removeFile,
		"POST /files":                  a.fileOperation,
		"GET /archive":                 a.readArchive,
		"PUT /archive":                 a.writeArchive,
		"POST /quiesce":                a.quiesce,
		"POST /thaw":                   a.thaw,
		"POST /shutdown":               a.shutdown,
		"GET /metrics":                 a.metrics,
	}
}

type connectionKey struct{}

// Serve answers on a listener until it fails.
func (a *Agent) Serve(listener net.Listener) error {
	server := &http.Server{
		Handler:  a,
		ErrorLog: log.New(console.Writer{}, "", 0),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connectionKey{}, c)
		},
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				a.connections.Add(1)
			case http.StateClosed, http.StateHijacked:
				a.connections.Add(-1)
			}
		},
	}
	return server.Serve(listener)
}

// ServeHTTP implements http.Handler.
func (a *Agent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		cause := recover()
		if cause == nil {
			return
		}
		if cause != http.ErrAbortHandler {
			console.Printf("panic in %s %s: %v\n%s", r.Method, r.URL.Path, cause, debug.Stack())
		}
		abort(r) // whatever was sent is not the whole answer
	}()
	matched, pattern := a.routes.Handler(r)
	if pattern == "" {
		refuseRoute(w, r, matched)
		return
	}
	a.routes.ServeHTTP(w, r)
}

// refuseRoute answers 404 or 405; which of them, and the methods that there
// are, is what the mux would have said.
func refuseRoute(w http.ResponseWriter, r *http.Request, matched http.Handler) {
	said := &discarded{header: w.Header(), status: http.StatusNotFound}
	matched.ServeHTTP(said, r)
	w.Header().Del("X-Content-Type-Options")
	text := "the agent has no route " + r.URL.Path
	if said.status == http.StatusMethodNotAllowed {
		text = r.URL.Path + " does not know the method " + r.Method + "; use " + w.Header().Get("Allow")
	}
	send(w, said.status, fault.New("route_not_found", text).Body())
}

// discarded notes the status of an answer that nobody gets.
type discarded struct {
	header http.Header
	status int
}

func (d *discarded) Header() http.Header         { return d.header }
func (d *discarded) WriteHeader(status int)      { d.status = status }
func (d *discarded) Write(p []byte) (int, error) { return len(p), nil }

// abort breaks the connection, so that the client cannot take a part for the
// whole. It does not return.
func abort(r *http.Request) {
	if stream, ok := r.Context().Value(connectionKey{}).(interface{ Abort() }); ok {
		stream.Abort()
	}
	panic(http.ErrAbortHandler)
}

// gone ends when the client has gone, also while the request's body is not
// read to its end, where net/http would not notice.
func gone(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	if stream, ok := r.Context().Value(connectionKey{}).(interface{ Gone() context.Context }); ok {
		stop := context.AfterFunc(stream.Gone(), cancel)
		return ctx, func() { stop(); cancel() }
	}
	return ctx, cancel
}

// politeness is how much of a request's body is still read before an error is
// answered: many clients look for an answer only when they have sent everything,
// and then find the connection broken.
const politeness = 8 << 20

func sendFault(w http.ResponseWriter, r *http.Request, err error) {
	f := fault.Of(err)
	if r.Method == http.MethodPut && r.Header.Get("Expect") == "" {
		io.CopyN(io.Discard, r.Body, politeness)
	}
	send(w, f.Status(), f.Body())
}
