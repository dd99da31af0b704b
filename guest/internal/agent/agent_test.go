package agent

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"fused/internal/execframe"
	"fused/internal/machine"
	"fused/internal/process"
	"fused/internal/reap"
)

const patience = 20 * time.Second

// server is an agent on a Unix socket, as an ordinary process.
type server struct {
	t        *testing.T
	agent    *Agent
	path     string
	folder   string // for a setup's secrets
	client   *http.Client
	shutDown chan struct{}
}

func newServer(t *testing.T) *server {
	t.Helper()
	reaper := reap.New(false, nil)
	s := &server{t: t, path: filepath.Join(t.TempDir(), "agent.sock"), folder: t.TempDir(), shutDown: make(chan struct{}, 1)}
	phases := &machine.Phases{}
	phases.Done("init")
	s.agent = New(Config{
		Version: "test", Nonce: "abc", Phases: phases, Launcher: &process.Launcher{Reaper: reaper},
		Shutdown: func() { s.shutDown <- struct{}{} }, Folder: s.folder,
	})
	listener, err := net.Listen("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	go s.agent.Serve(listener)
	dial := func(string, string) (net.Conn, error) { return net.Dial("unix", s.path) }
	s.client = &http.Client{Transport: &http.Transport{Dial: dial}, Timeout: patience}
	t.Cleanup(func() {
		s.agent.stop()
		listener.Close()
		reaper.Stop()
	})
	return s
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

func (s *server) do(method, path string, body any, header ...string) answer {
	s.t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	case []byte:
		reader = bytes.NewReader(b)
	default:
		text, err := json.Marshal(b)
		if err != nil {
			s.t.Fatal(err)
		}
		reader = bytes.NewReader(text)
	}
	request, err := http.NewRequest(method, "http://guest"+path, reader)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		request.Header.Set(header[i], header[i+1])
	}
	response, err := s.client.Do(request)
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer{response.StatusCode, response.Header, text}
}

type object = map[string]any

func (a answer) json(t *testing.T) object {
	t.Helper()
	var value object
	if err := json.Unmarshal(a.body, &value); err != nil {
		t.Fatalf("%d %q: %v", a.status, a.body, err)
	}
	return value
}

// fails checks an error answer in full.
func (a answer) fails(t *testing.T, status int, code, reason string) {
	t.Helper()
	body := a.json(t)
	details, _ := body["details"].(object)
	text, _ := body["error"].(string)
	if a.status != status || body["code"] != code || details["reason"] != reason || text == "" {
		t.Errorf("got %d %s, want %d %s %s", a.status, a.body, status, code, reason)
	}
	for name, value := range details {
		if _, ok := value.(string); !ok {
			t.Errorf("detail %s is no string", name)
		}
	}
	if a.header.Get("Content-Type") != "application/json" {
		t.Errorf("content type %q", a.header.Get("Content-Type"))
	}
}

func at(path string) string { return "?path=" + url.QueryEscape(path) }

func TestRoutes(t *testing.T) {
	s := newServer(t)
	s.do("GET", "/nope", nil).fails(t, 404, "route_not_found", "route_not_found")
	s.do("GET", "/processes/1/nope", nil).fails(t, 404, "route_not_found", "route_not_found")
	wrong := s.do("DELETE", "/health", nil)
	wrong.fails(t, 405, "route_not_found", "route_not_found")
	if allow := wrong.header.Get("Allow"); !strings.Contains(allow, "GET") {
		t.Errorf("Allow: %q", allow)
	}
}

func TestHealth(t *testing.T) {
	s := newServer(t)
	body := s.do("GET", "/health", nil).json(t)
	for _, name := range []string{"ok", "protocol", "version", "nonce", "boot_id", "uptime_ms", "time_unix_ns", "hostname", "boot", "processes"} {
		if _, ok := body[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if body["protocol"] != "1.2" || body["version"] != "test" || body["nonce"] != "abc" {
		t.Errorf("%v", body)
	}
}

func TestMetrics(t *testing.T) {
	text := string(newServer(t).do("GET", "/metrics", nil).body)
	for _, name := range []string{
		"uptime_seconds", "load1", "memory_total_bytes", "memory_available_bytes", "overlay_total_bytes", "overlay_free_bytes",
		"processes", "streams",
	} {
		if !strings.Contains(text, "\nfused_"+name+" ") {
			t.Errorf("fused_%s is missing", name)
		}
	}
}

func TestConfigureIsAppliedOnceAndReachesCommands(t *testing.T) {
	s := newServer(t)
	body := object{
		"generation": 1, "env": object{"FROM": "configure", "BOTH": "configure"},
		"image": object{"env": object{"BOTH": "image", "IMG": "1"}, "workdir": "/usr", "user": "root"}, "unknown": 1,
	}
	health := s.do("POST", "/configure", body).json(t)
	if boot := fmt.Sprint(health["boot"]); !strings.Contains(boot, "configured") {
		t.Errorf("phases %s", boot)
	}
	s.do("POST", "/configure", body)
	out := s.run(object{"cmd": []string{"/bin/sh", "-c", "echo $FROM $BOTH $IMG $(pwd)"}}).out
	if out != "configure configure 1 /usr\n" {
		t.Errorf("got %q", out)
	}
	// A field that is absent leaves things as they are.
	s.do("POST", "/configure", object{"env": object{}})
	if out := s.run(object{"cmd": []string{"/bin/sh", "-c", "echo $FROM $BOTH $IMG $(pwd)"}}).out; out != "image 1 /usr\n" {
		t.Errorf("got %q", out)
	}
	s.do("POST", "/configure", object{"hostname": "bad name"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/configure", object{"nameservers": []string{"dns.example"}}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/configure", object{"hosts": object{"a\nb": "1.2.3.4"}}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/configure", object{"generation": "x"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/configure", object{"entropy_b64": "!"}).fails(t, 400, "invalid_argument", "bad_request")
}

type result struct {
	body     object
	out, err string
}

func (s *server) run(request object) result {
	s.t.Helper()
	a := s.do("POST", "/exec", request)
	if a.status != 200 {
		s.t.Fatalf("%d %s", a.status, a.body)
	}
	body := a.json(s.t)
	decode := func(name string) string {
		text, err := base64.StdEncoding.DecodeString(body[name].(string))
		if err != nil {
			s.t.Fatal(err)
		}
		return string(text)
	}
	return result{body, decode("stdout_b64"), decode("stderr_b64")}
}

func TestExec(t *testing.T) {
	s := newServer(t)
	r := s.run(object{"shell": "cat; echo err >&2; exit 3", "stdin_b64": base64.StdEncoding.EncodeToString([]byte("\x00\xff"))})
	if r.out != "\x00\xff" || r.err != "err\n" || r.body["exit_code"] != 3.0 || r.body["timed_out"] != false {
		t.Errorf("%+v", r)
	}
	if _, ok := r.body["signal"]; ok {
		t.Error("signal must be absent")
	}
	r = s.run(object{"cmd": []string{"sleep", "100"}, "timeout_ms": 50})
	if r.body["exit_code"] != 124.0 || r.body["timed_out"] != true {
		t.Errorf("%+v", r)
	}
	r = s.run(object{"cmd": []string{"sh", "-c", "kill -9 $$"}})
	if r.body["exit_code"] != 137.0 || r.body["signal"] != "KILL" {
		t.Errorf("%+v", r)
	}
	s.do("POST", "/exec", object{"cmd": []string{"no-such"}}).fails(t, 400, "invalid_argument", "command_not_found")
	s.do("POST", "/exec", object{"cmd": "true"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/exec", "{").fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/exec", object{"cmd": []string{"cat"}, "stdin_b64": "%"}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/exec", bytes.Repeat([]byte(" "), maxBody+1)).fails(t, 413, "payload_too_large", "payload_too_large")
}

func TestExecKeepsTheFirstBytesAndCountsTheRest(t *testing.T) {
	s := newServer(t)
	for _, limit := range []int{1, 2, 3, 100, keeperPiece, keeperPiece + 1, 500000} {
		r := s.run(object{"shell": "seq 1 100000; printf xy >&2", "max_output_bytes": limit})
		total := 588895
		if len(r.out) != limit || r.body["total"].(object)["stdout"] != float64(total) || r.body["truncated"].(object)["stdout"] != true {
			t.Errorf("limit %d: %d bytes, %v %v", limit, len(r.out), r.body["total"], r.body["truncated"])
		}
		if r.body["truncated"].(object)["stderr"] != (limit < 2) || !strings.HasPrefix("1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n", r.out[:min(limit, 20)]) {
			t.Errorf("limit %d: %v", limit, r.body["truncated"])
		}
	}
	if r := s.run(object{"shell": "head -c 20000000 /dev/zero"}); len(r.out) != process.MaxOutput {
		t.Errorf("the cap is %d bytes", len(r.out))
	}
}

func awaitGone(t *testing.T, marker string) {
	t.Helper()
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		if countProcesses(marker) == 0 {
			return
		}
	}
	t.Errorf("%s still runs", marker)
}

func awaitThere(t *testing.T, marker string) {
	t.Helper()
	for until := time.Now().Add(patience); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		if countProcesses(marker) > 0 {
			return
		}
	}
	t.Fatalf("%s does not run", marker)
}

func countProcesses(marker string) int { return len(processes(marker)) }

func processes(marker string) []int {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	var pids []int
	for _, path := range lines {
		text, _ := os.ReadFile(path)
		if strings.Contains(strings.ReplaceAll(string(text), "\x00", " "), marker) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// marker is a sleep that no other test uses.
func marker() string { return fmt.Sprintf("sleep 3%d.%d", os.Getpid(), time.Now().UnixNano()) }

func TestAClientThatGoesAwayEndsItsCommand(t *testing.T) {
	s := newServer(t)
	conn, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	mark := marker()
	body := fmt.Sprintf(`{"cmd":["sh","-c","%s & wait"]}`, mark)
	fmt.Fprintf(conn, "POST /exec HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	awaitThere(t, mark)
	conn.Close()
	awaitGone(t, mark)
}

// frames is a client of an interactive conversation.
type frames struct {
	t    *testing.T
	conn net.Conn
	from *execframe.Reader
}

func (s *server) interactive(start string) *frames {
	s.t.Helper()
	conn, err := net.Dial("unix", s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, "GET /exec HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: fuse-frames/1\r\n\r\n")
	// The first frame may come in the same packet as the request.
	f := &frames{t: s.t, conn: conn}
	f.send(execframe.Start, start)
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, nil)
	if err != nil || response.StatusCode != 101 || response.Header.Get("Upgrade") != "fuse-frames/1" {
		s.t.Fatalf("%v %v", response, err)
	}
	f.from = execframe.NewReader(reader)
	return f
}

func (f *frames) send(kind execframe.Type, payload string) {
	f.conn.Write(execframe.Append(nil, kind, []byte(payload)))
}

func (f *frames) next() (execframe.Type, string) {
	f.t.Helper()
	kind, payload, err := f.from.Next()
	if err != nil {
		f.t.Fatal(err)
	}
	return kind, string(payload)
}

// collect reads to the last frame.
func (f *frames) collect() (out, err string, last execframe.Type, end object) {
	f.t.Helper()
	for {
		kind, payload := f.next()
		switch kind {
		case execframe.Stdout:
			out += payload
		case execframe.Stderr:
			err += payload
		case execframe.Exit, execframe.Error:
			json.Unmarshal([]byte(payload), &end)
			if _, _, e := f.from.Next(); e != io.EOF {
				f.t.Errorf("after the last frame: %v", e)
			}
			return out, err, kind, end
		}
	}
}

func (f *frames) started() int {
	f.t.Helper()
	kind, payload := f.next()
	var body struct{ PID int }
	if kind != execframe.Started || json.Unmarshal([]byte(payload), &body) != nil || body.PID == 0 {
		f.t.Fatalf("first frame %d %s", kind, payload)
	}
	return body.PID
}

// await reads output until the text has come; the deadline ends it otherwise.
func (f *frames) await(text string) {
	f.t.Helper()
	for seen := ""; !strings.Contains(seen, text); {
		_, payload := f.next()
		seen += payload
	}
}

func TestInteractivePipes(t *testing.T) {
	s := newServer(t)
	f := s.interactive(`{"cmd":["sh","-c","cat; echo done >&2; exit 9"]}`)
	f.started()
	big := strings.Repeat("0123456789", 300000)
	go func() {
		for i := 0; i < len(big); i += 1 << 20 {
			f.send(execframe.Stdin, big[i:min(i+1<<20, len(big))])
		}
		f.send(execframe.StdinEOF, "")
	}()
	out, err, kind, end := f.collect()
	if out != big || err != "done\n" || kind != execframe.Exit || end["exit_code"] != 9.0 {
		t.Errorf("%d bytes, %q, %v", len(out), err, end)
	}
}

func TestInteractiveTerminal(t *testing.T) {
	s := newServer(t)
	f := s.interactive(`{"shell":"stty size; read x; stty size; exec cat","tty":true,"rows":7,"cols":70}`)
	f.started()
	f.await("7 70")
	f.send(execframe.Resize, `{"rows":8,"cols":80}`)
	f.send(execframe.Resize, `{"rows":0,"cols":80}`) // impossible: ignored
	f.send(execframe.Stdin, "\n")
	f.await("8 80")
	f.send(execframe.Signal, `{"signal":"NOPE"}`) // ignored
	f.send(execframe.Signal, `{"signal":2}`)
	if _, _, kind, end := f.collect(); kind != execframe.Exit || end["signal"] != "INT" {
		t.Errorf("%v %v", kind, end)
	}
}

func TestSignalsOvertakeInputThatNobodyReads(t *testing.T) {
	s := newServer(t)
	f := s.interactive(`{"cmd":["sleep","300"]}`)
	f.started()
	f.send(execframe.Stdin, strings.Repeat("x", 600000)) // more than a pipe holds
	f.send(execframe.Signal, `{"signal":"TERM"}`)
	if _, _, _, end := f.collect(); end["signal"] != "TERM" {
		t.Errorf("%v", end)
	}
}

func TestInteractiveErrors(t *testing.T) {
	s := newServer(t)
	_, _, kind, end := s.interactive(`{"cmd":["no-such"]}`).collect()
	if kind != execframe.Error || end["code"] != "invalid_argument" || end["details"].(object)["reason"] != "command_not_found" {
		t.Errorf("%v %v", kind, end)
	}
	if _, _, kind, _ := s.interactive(`nonsense`).collect(); kind != execframe.Error {
		t.Errorf("%v", kind)
	}
	s.do("GET", "/exec", nil).fails(t, 400, "invalid_argument", "bad_request")
}

func TestAnInteractiveClientThatGoesAwayHangsUp(t *testing.T) {
	s := newServer(t)
	for _, options := range []string{"", `,"tty":true`} {
		mark := marker()
		f := s.interactive(fmt.Sprintf(`{"cmd":["sh","-c","trap '' HUP; %s; true"]%s}`, mark, options))
		f.started()
		awaitThere(t, mark)
		f.conn.Close()
		awaitGone(t, mark)
	}
}

func TestProcesses(t *testing.T) {
	s := newServer(t)
	a := s.do("POST", "/processes", object{"shell": "echo ready; while read l; do echo got $l; done; exit 5", "stdin": true})
	if a.status != 201 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	started := a.json(t)
	pid := strconv.Itoa(int(started["pid"].(float64)))
	base := "/processes/" + pid
	if started["state"] != "running" || fmt.Sprint(started["cmd"]) != "[/bin/sh -lc echo ready; while read l; do echo got $l; done; exit 5]" {
		t.Errorf("%v", started)
	}
	response, err := s.client.Get("http://guest" + base + "/output?stream=stdout&offset=0&follow=true")
	if err != nil || response.Header.Get("X-Fuse-Offset") != "0" || response.Header.Get("X-Fuse-Lost") != "0" {
		t.Fatalf("%v %v", response, err)
	}
	defer response.Body.Close()
	if n := s.do("POST", base+"/stdin", "one\n").json(t)["bytes"]; n != 4.0 {
		t.Errorf("%v bytes", n)
	}
	s.do("POST", base+"/stdin?eof=true", "two\n")
	followed, err := io.ReadAll(response.Body)
	if string(followed) != "ready\ngot one\ngot two\n" || err != nil {
		t.Errorf("followed %q, %v", followed, err)
	}
	shown := s.do("GET", base, nil).json(t)
	if shown["state"] != "exited" || shown["exit"].(object)["exit_code"] != 5.0 {
		t.Errorf("%v", shown)
	}
	part := s.do("GET", base+"/output?offset=6", nil)
	if string(part.body) != "got one\ngot two\n" || part.header.Get("X-Fuse-Offset") != "6" || part.header.Get("Content-Length") != "16" {
		t.Errorf("%q %v", part.body, part.header)
	}
	if list := s.do("GET", "/processes", nil).json(t)["processes"].([]any); len(list) != 1 {
		t.Errorf("%v", list)
	}
	s.do("POST", base+"/stdin", "x").fails(t, 409, "conflict", "stdin_closed")
	s.do("POST", base+"/signal", object{"signal": "TERM"}).fails(t, 404, "not_found", "process_not_found")
	s.do("GET", base+"/output?stream=nope", nil).fails(t, 400, "invalid_argument", "bad_request")
	s.do("GET", base+"/output?offset=23", nil).fails(t, 400, "invalid_argument", "bad_request")
	s.do("GET", "/processes/1", nil).fails(t, 404, "not_found", "process_not_found")
}

func TestSignalsToABackgroundProcess(t *testing.T) {
	s := newServer(t)
	started := s.do("POST", "/processes", object{"cmd": []string{"sleep", "300"}}).json(t)
	base := fmt.Sprintf("/processes/%v", started["pid"])
	s.do("POST", base+"/signal", object{"signal": "NOPE"}).fails(t, 400, "invalid_argument", "unknown_signal")
	s.do("POST", base+"/signal", object{}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", base+"/stdin", "x").fails(t, 409, "conflict", "stdin_closed")
	if a := s.do("POST", base+"/signal", object{"signal": 15}); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
	response, err := s.client.Get("http://guest" + base + "/output?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	io.ReadAll(response.Body)
	response.Body.Close()
	if shown := s.do("GET", base, nil).json(t); shown["exit"].(object)["signal"] != "TERM" {
		t.Errorf("%v", shown)
	}
}

func TestLostOutputIsSaid(t *testing.T) {
	s := newServer(t)
	started := s.do("POST", "/processes", object{"shell": "head -c 3000000 /dev/zero; echo end"}).json(t)
	base := fmt.Sprintf("/processes/%v", started["pid"])
	for {
		if s.do("GET", base, nil).json(t)["state"] == "exited" {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	a := s.do("GET", base+"/output?offset=1000&follow=true", nil)
	first := 3000004 - process.RingSize
	if a.header.Get("X-Fuse-Offset") != strconv.Itoa(first) || a.header.Get("X-Fuse-Lost") != strconv.Itoa(first-1000) {
		t.Errorf("%v", a.header)
	}
	if len(a.body) != process.RingSize || !bytes.HasSuffix(a.body, []byte("\x00end\n")) {
		t.Errorf("%d bytes", len(a.body))
	}
}

func TestAFollowerThatFallsBehindIsCutOff(t *testing.T) {
	s := newServer(t)
	started := s.do("POST", "/processes", object{"shell": "echo go; read x; head -c 9000000 /dev/zero", "stdin": true}).json(t)
	base := fmt.Sprintf("/processes/%v", started["pid"])
	response, err := s.client.Get("http://guest" + base + "/output?follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	s.do("POST", base+"/stdin", "x\n") // and nobody reads what follows
	for s.do("GET", base, nil).json(t)["state"] != "exited" {
		time.Sleep(5 * time.Millisecond)
	}
	got, err := io.ReadAll(response.Body)
	if err == nil {
		t.Errorf("an orderly end after %d bytes", len(got))
	}
}

func TestFilesOverHTTP(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "a b/ü%&")
	data := bytes.Repeat([]byte("0123456789"), 50000)
	written := s.do("PUT", "/files"+at(path)+"&mode=0600", data)
	if written.status != 200 || written.json(t)["size_bytes"] != 500000.0 {
		t.Fatalf("%d %s", written.status, written.body)
	}
	got := s.do("GET", "/files"+at(path), nil)
	if !bytes.Equal(got.body, data) || got.header.Get("X-Fuse-Mode") != "0600" || got.header.Get("X-Fuse-Mtime-Ms") == "" {
		t.Errorf("%d %v", got.status, got.header)
	}
	head := s.do("HEAD", "/files"+at(path), nil)
	if head.status != 200 || head.header.Get("Content-Length") != "500000" || head.header.Get("X-Fuse-Mode") != "0600" || len(head.body) != 0 {
		t.Errorf("%d %v", head.status, head.header)
	}
	for header, wanted := range map[string]struct {
		status int
		body   []byte
		which  string
	}{
		"bytes=10-19":         {206, data[10:20], "bytes 10-19/500000"},
		"bytes=499990-":       {206, data[499990:], "bytes 499990-499999/500000"},
		"bytes=499990-999999": {206, data[499990:], "bytes 499990-499999/500000"},
		"bytes=-5":            {206, data[499995:], "bytes 499995-499999/500000"},
		"bytes=-900000":       {206, data, "bytes 0-499999/500000"},
		"bytes=0-1,5-6":       {200, data, ""},
		"bytes=5-2":           {200, data, ""},
		"lines=1-2":           {200, data, ""},
	} {
		a := s.do("GET", "/files"+at(path), nil, "Range", header)
		if a.status != wanted.status || !bytes.Equal(a.body, wanted.body) || a.header.Get("Content-Range") != wanted.which {
			t.Errorf("%s: %d, %d bytes, %q", header, a.status, len(a.body), a.header.Get("Content-Range"))
		}
	}
	for _, header := range []string{"bytes=500000-", "bytes=-0"} {
		s.do("GET", "/files"+at(path), nil, "Range", header).fails(t, 400, "invalid_argument", "bad_range")
	}
	if proc := s.do("GET", "/files"+at("/proc/self/status"), nil); !bytes.Contains(proc.body, []byte("VmRSS")) {
		t.Errorf("/proc: %d %q", proc.status, proc.body)
	}
	s.do("GET", "/files"+at(dir), nil).fails(t, 409, "conflict", "is_a_directory")
	s.do("GET", "/files"+at(dir+"/x"), nil).fails(t, 404, "not_found", "file_not_found")
	s.do("GET", "/files?path=relative", nil).fails(t, 400, "invalid_argument", "bad_path")
	s.do("GET", "/files", nil).fails(t, 400, "invalid_argument", "bad_path")
	s.do("PUT", "/files"+at(path)+"&mode=9", "x").fails(t, 400, "invalid_argument", "bad_request")
	s.do("PUT", "/files"+at(path)+"&user=nobody-here", "x").fails(t, 400, "invalid_argument", "unknown_user")
	s.do("PUT", "/files"+at(dir+"/n/o")+"&mkdirs=false", "x").fails(t, 404, "not_found", "file_not_found")
	s.do("DELETE", "/files"+at(filepath.Dir(path)), nil).fails(t, 409, "conflict", "directory_not_empty")
	if a := s.do("DELETE", "/files"+at(filepath.Dir(path))+"&recursive=true", nil); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestFileOperations(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	made := s.do("POST", "/files?op=mkdir", object{"path": dir + "/x/y", "mode": "0711"}).json(t)
	if made["type"] != "directory" || made["mode"] != "0711" || made["name"] != "y" {
		t.Errorf("%v", made)
	}
	s.do("POST", "/files?op=mkdir", object{"path": dir + "/p/q", "parents": false}).fails(t, 404, "not_found", "file_not_found")
	s.do("POST", "/files?op=mkdir", object{"path": dir + "/x/y", "parents": false}).fails(t, 409, "conflict", "file_exists")
	s.do("PUT", "/files"+at(dir+"/x/f"), "text")
	if list := s.do("POST", "/files?op=list", object{"path": dir + "/x"}).json(t)["entries"].([]any); len(list) != 2 {
		t.Errorf("%v", list)
	}
	if list := s.do("POST", "/files?op=list", object{"path": dir + "/x/y"}); string(list.body) != `{"entries":[]}` {
		t.Errorf("%s", list.body)
	}
	moved := s.do("POST", "/files?op=move", object{"path": dir + "/x/f", "to": dir + "/g"}).json(t)
	if moved["path"] != dir+"/g" || moved["size_bytes"] != 4.0 {
		t.Errorf("%v", moved)
	}
	s.do("POST", "/files?op=move", object{"path": dir + "/none", "to": dir + "/h"}).fails(t, 404, "not_found", "file_not_found")
	s.do("POST", "/files?op=move", object{"path": dir + "/g"}).fails(t, 400, "invalid_argument", "bad_path")
	s.do("POST", "/files?op=stat", object{"path": dir + "/none"}).fails(t, 404, "not_found", "file_not_found")
	s.do("POST", "/files?op=nope", object{"path": dir}).fails(t, 400, "invalid_argument", "bad_request")
	s.do("POST", "/files?op=remove", object{"path": dir + "/x"}).fails(t, 409, "conflict", "directory_not_empty")
	if a := s.do("POST", "/files?op=remove", object{"path": dir + "/x", "recursive": true}); a.status != 204 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestABodyThatIsCutOffLeavesNothing(t *testing.T) {
	s := newServer(t)
	dir := t.TempDir()
	for _, head := range []string{"Content-Length: 100000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n10000\r\n"} {
		conn, err := net.Dial("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "PUT /files%s HTTP/1.1\r\nHost: g\r\n%s%s", at(dir+"/file"), head, strings.Repeat("x", 5000))
		conn.(*net.UnixConn).CloseWrite()
		io.ReadAll(conn)
		conn.Close()
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}

func TestArchivesOverHTTP(t *testing.T) {
	s := newServer(t)
	from, to := t.TempDir(), t.TempDir()
	os.WriteFile(from+"/file", []byte("text"), 0o644)
	packed := s.do("GET", "/archive"+at(from), nil)
	if packed.status != 200 {
		t.Fatalf("%d", packed.status)
	}
	done := s.do("PUT", "/archive"+at(to), packed.body).json(t)
	if done["entries"] != 2.0 || done["bytes"] != 4.0 {
		t.Errorf("%v", done)
	}
	if text, _ := os.ReadFile(filepath.Join(to, filepath.Base(from), "file")); string(text) != "text" {
		t.Errorf("%q", text)
	}
	s.do("GET", "/archive"+at(from+"/none"), nil).fails(t, 404, "not_found", "file_not_found")
	s.do("PUT", "/archive"+at(from+"/file"), packed.body).fails(t, 409, "conflict", "not_a_directory")
	s.do("PUT", "/archive"+at(to), "nonsense that is no archive").fails(t, 400, "invalid_argument", "bad_request")
}

func TestShutdown(t *testing.T) {
	s := newServer(t)
	if a := s.do("POST", "/shutdown", object{"reboot": false}); a.status != 202 {
		t.Errorf("%d %s", a.status, a.body)
	}
	<-s.shutDown
}

func TestAPanicIsOneRequestsProblem(t *testing.T) {
	s := newServer(t)
	s.agent.routes.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("test") })
	if response, err := s.client.Get("http://guest/panic"); err == nil {
		t.Errorf("answered %d", response.StatusCode)
	}
	if a := s.do("GET", "/health", nil); a.status != 200 {
		t.Errorf("%d", a.status)
	}
}

func TestAnOrdinaryProcessFreezesNothing(t *testing.T) {
	s := newServer(t)
	s.do("POST", "/quiesce", object{"limit_ms": 1000}).fails(t, 501, "unimplemented", "not_supported")
	for _, limit := range []int{0, -1, 60_001} {
		s.do("POST", "/quiesce", object{"limit_ms": limit}).fails(t, 400, "invalid_argument", "bad_request")
	}
	if a := s.do("POST", "/thaw", object{}); a.status != 200 || a.json(t)["was_frozen"] != false {
		t.Errorf("%d %s", a.status, a.body)
	}
}
