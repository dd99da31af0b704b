package agent

import (
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func encoded(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// awaitState follows GET /state until it is what is wanted.
func (s *server) awaitState(what string, holds func(object) bool) object {
	s.t.Helper()
	state := s.do("GET", "/state", nil).json(s.t)
	for until := time.Now().Add(patience); !holds(state); {
		if time.Now().After(until) {
			s.t.Fatalf("never %s: %v", what, state)
		}
		state = s.do("GET", fmt.Sprintf("/state?after=%.0f&wait_ms=5000", state["version"]), nil).json(s.t)
	}
	return state
}

func partIs(part, state string) func(object) bool {
	return func(whole object) bool {
		body, _ := whole[part].(object)
		return body["state"] == state
	}
}

func TestASetupReachesCommands(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	s.do("POST", "/configure", object{"env": object{"BOTH": "configure", "HOST": "1"}, "image": object{"workdir": "/usr"}})
	body := object{
		"id": "u/1", "env": object{"BOTH": "setup"}, "workdir": dir + "/work",
		"fuse":  object{"auth-token": object{"content_b64": encoded("t0ken")}},
		"files": object{dir + "/a/f": object{"content_b64": encoded("text"), "mode": "0711"}},
	}
	state := s.do("PUT", "/setup", body).json(t)
	if state["setup_id"] != "u/1" || state["agent"] != nil || state["health"] != nil {
		t.Errorf("%v", state)
	}
	if again := s.do("PUT", "/setup", body).json(t); again["version"] != state["version"] {
		t.Errorf("%v, then %v", state, again)
	}
	command := object{"cmd": []string{"/bin/sh", "-c", "echo $BOTH $HOST $MINE; pwd; stat -c %a " + dir + "/a/f"}, "env": object{"MINE": "request"}}
	if out := s.run(command).out; out != "setup 1 request\n"+dir+"/work\n711\n" {
		t.Errorf("%q", out)
	}
	// configure again, as after a restart of the host daemon, takes nothing away.
	s.do("POST", "/configure", object{"env": object{"BOTH": "configure"}, "generation": 2})
	if out := s.run(command).out; !strings.HasPrefix(out, "setup request\n"+dir+"/work\n") {
		t.Errorf("%q", out)
	}
	if text, err := os.ReadFile(s.folder + "/auth-token"); string(text) != "t0ken" {
		t.Errorf("%q %v", text, err)
	}
	s.do("PUT", "/setup", object{"id": "2", "files": object{"/proc/x": object{}}}).fails(t, 400, "invalid_argument", "bad_path")
	s.do("PUT", "/setup", object{"id": "2", "fuse": object{"x": object{"content_b64": "%"}}}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("PUT", "/setup", object{"id": 2}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("PUT", "/setup", nil).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/setup", object{"id": "2"}).fails(t, 405, "route_not_found", "route_not_found")
}

func TestAKeyStartsOneProcess(t *testing.T) {
	s := newServer(t)
	request := object{"shell": "echo once; exit 3", "key": "startup"}
	first := s.do("POST", "/processes", request)
	if first.status != 201 || first.json(t)["key"] != "startup" {
		t.Fatalf("%d %s", first.status, first.body)
	}
	out := s.do("GET", "/processes/@startup/output?follow=true", nil)
	if string(out.body) != "once\n" {
		t.Errorf("%q", out.body)
	}
	again := s.do("POST", "/processes", object{"cmd": []string{"no-such"}, "key": "startup"})
	body := again.json(t)
	if again.status != 200 || body["pid"] != first.json(t)["pid"] || body["state"] != "exited" || body["exit"].(object)["exit_code"] != 3.0 {
		t.Errorf("%d %s", again.status, again.body)
	}
	s.do("POST", "/processes", object{"cmd": []string{"no-such"}, "key": "free"}).fails(t, 400, "invalid_argument", "command_not_found")
	s.do("GET", "/processes/@free", nil).fails(t, 404, "not_found", "process_not_found")
	if a := s.do("POST", "/processes", object{"cmd": []string{"true"}, "key": "free"}); a.status != 201 {
		t.Errorf("%d %s", a.status, a.body)
	}
	s.do("POST", "/processes", object{"cmd": []string{"true"}, "key": "a b"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/processes", object{"cmd": []string{"true"}, "key": strings.Repeat("x", 65)}).fails(t, 400, "invalid_argument", "bad_request")
}

func TestManyAtOnceWithOneKeyStartOne(t *testing.T) {
	s := newServer(t)
	pids := make(chan any)
	for range 16 {
		go func() {
			pids <- s.do("POST", "/processes", object{"cmd": []string{"sleep", "0.1"}, "key": "k"}).json(t)["pid"]
		}()
	}
	first := <-pids
	for range 15 {
		if pid := <-pids; pid != first || pid == nil {
			t.Errorf("%v and %v", first, pid)
		}
	}
}

func TestADaemonOverHTTP(t *testing.T) {
	s := newServer(t)
	if out := s.do("GET", "/agent/output?follow=true", nil); out.status != 200 || len(out.body) != 0 {
		t.Errorf("%d %q", out.status, out.body)
	}
	if drained := s.do("POST", "/agent/drain", object{"timeout_ms": 1000}); string(drained.body) != `{"message":""}` {
		t.Errorf("%s", drained.body)
	}
	order := object{
		"id": "o1", "command": []string{"/bin/sh", "-c", "echo why >&2; echo up; exec sleep 1000"}, "drain_command": []string{"echo", "drained"},
	}
	if state := s.do("PUT", "/agent", order).json(t); state["agent_id"] != "o1" {
		t.Errorf("%v", state)
	}
	s.awaitState("running", partIs("agent", "running"))
	response, err := s.client.Get("http://guest/agent/output?offset=0&follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	up := make([]byte, 3)
	if _, err := io.ReadFull(response.Body, up); string(up) != "up\n" {
		t.Fatalf("%q %v", up, err)
	}
	if drained := s.do("POST", "/agent/drain", object{"timeout_ms": 20000}).json(t); drained["exit_code"] != 143.0 || drained["message"] != "" {
		t.Errorf("%v", drained)
	}
	if followed, err := io.ReadAll(response.Body); string(followed) != "drained\n" || err != nil {
		t.Errorf("followed %q, %v", followed, err)
	}
	if out := s.do("GET", "/agent/output?stream=stderr&offset=1", nil); string(out.body) != "hy\n" || out.header.Get("X-Fuse-Offset") != "1" {
		t.Errorf("%q %v", out.body, out.header)
	}
	state := s.do("GET", "/state", nil).json(t)["agent"].(object)
	if state["state"] != "drained" || state["exit_code"] != 143.0 || state["restarts"] != 0.0 || state["since_ms"].(float64) < 1e12 {
		t.Errorf("%v", state)
	}
	s.do("PUT", "/agent", object{"id": "o2"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("PUT", "/agent", object{"id": "o2", "command": "x"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/agent/drain", object{}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("GET", "/agent/output?stream=x", nil).fails(t, 400, "invalid_argument", "bad_request")
	s.do("GET", "/agent/output?offset=1000", nil).fails(t, 400, "invalid_argument", "bad_request")
}

func TestAHealthCheckOverHTTP(t *testing.T) {
	s := newServer(t)
	check := object{"exec": []string{"true"}, "http": nil, "interval_seconds": 1, "timeout_seconds": 1}
	if state := s.do("PUT", "/healthcheck", check).json(t); state["health"].(object)["state"] == "failing" {
		t.Errorf("%v", state)
	}
	s.awaitState("passing", partIs("health", "passing"))
	s.do("PUT", "/healthcheck", object{"exec": []string{"no-such"}, "interval_seconds": 1, "timeout_seconds": 1, "retries": 1})
	state := s.awaitState("failing", partIs("health", "failing"))["health"].(object)
	if !strings.Contains(state["message"].(string), "no-such") || state["failures"].(float64) < 1 {
		t.Errorf("%v", state)
	}
	if state := s.do("DELETE", "/healthcheck", nil).json(t); state["health"] != nil {
		t.Errorf("%v", state)
	}
	s.do("PUT", "/healthcheck", check)
	if state := s.do("PUT", "/healthcheck", object{}).json(t); state["health"] != nil {
		t.Errorf("%v", state)
	}
	s.do("PUT", "/healthcheck", object{"http": object{"port": 0}}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("PUT", "/healthcheck", object{"http": "x"}).fails(t, 400, "invalid_argument", "bad_request")
}

func TestStateWaitsForNews(t *testing.T) {
	s := newServer(t)
	version := s.do("GET", "/state", nil).json(t)["version"]
	if same := s.do("GET", fmt.Sprintf("/state?after=%.0f&wait_ms=1", version), nil).json(t); same["version"] != version {
		t.Errorf("%v after %v", same, version)
	}
	if other := s.do("GET", "/state?after=1&wait_ms=60000", nil).json(t); other["version"] != version {
		t.Errorf("%v", other)
	}
	news := make(chan object)
	go func() { news <- s.do("GET", fmt.Sprintf("/state?after=%.0f&wait_ms=60000", version), nil).json(t) }()
	s.do("PUT", "/setup", object{"id": "x"})
	if state := <-news; state["setup_id"] != "x" || state["version"] == version {
		t.Errorf("%v", state)
	}
	for _, query := range []string{"after=x", "after=-1", "wait_ms=60001", "wait_ms=-1", "after=1.5"} {
		s.do("GET", "/state?"+query, nil).fails(t, 400, "invalid_argument", "bad_request")
	}
}

// A machine of our own has one end for all that runs in it: the agent hands it over as it is.
func TestAMachinesEndFindsEverythingAsItWas(t *testing.T) {
	s := newServer(t)
	s.agent.config.Owned = true
	mark := marker()
	s.do("PUT", "/agent", object{"id": "1", "command": []string{"sh", "-c", mark + " & wait"}, "restart": "always"})
	awaitThere(t, mark)
	for range 2 {
		if a := s.do("POST", "/shutdown", nil); a.status != http.StatusAccepted {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	<-s.shutDown
	if countProcesses(mark) == 0 {
		t.Error("the daemon has got less than the machine's own time")
	}
	for _, pid := range processes(mark) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	awaitGone(t, mark)
	if len(s.shutDown) > 0 {
		t.Error("the machine was ended twice")
	}
	s.agent.config.Owned = false
}

func TestAShutdownEndsTheDaemonFirst(t *testing.T) {
	s := newServer(t)
	mark := marker()
	s.do("PUT", "/agent", object{"id": "1", "command": []string{"sh", "-c", mark + " & wait"}})
	awaitThere(t, mark)
	s.do("PUT", "/healthcheck", object{"exec": []string{"true"}})
	if a := s.do("POST", "/shutdown", nil); a.status != http.StatusAccepted {
		t.Fatalf("%d %s", a.status, a.body)
	}
	<-s.shutDown
	awaitGone(t, mark)
	state := s.do("GET", "/state", nil).json(t)
	if !partIs("agent", "exited")(state) || state["health"] != nil {
		t.Errorf("%v", state)
	}
}
