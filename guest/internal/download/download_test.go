package download

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const program = "#!/bin/sh\necho hello\n"

var quick = Limits{Bytes: 1 << 20, Total: time.Minute, Idle: time.Minute, Pauses: []time.Duration{time.Millisecond, time.Millisecond}}

func sum(text string) string {
	digest := sha256.Sum256([]byte(text))
	return hex.EncodeToString(digest[:])
}

// site answers by script: the n-th request gets the n-th handler, the last one
// for ever.
type site struct {
	*httptest.Server
	requests atomic.Int64
}

func serve(t *testing.T, encrypted bool, handlers ...http.HandlerFunc) *site {
	s := &site{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(s.requests.Add(1))
		handlers[min(n, len(handlers))-1](w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if encrypted {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func text(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func fetch(t *testing.T, url, digest string, limits Limits) (path string, err error) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "agent")
	err = Fetch(context.Background(), Order{URL: url, SHA256: digest, Path: path}, limits)
	if entries, _ := os.ReadDir(filepath.Dir(path)); err != nil && len(entries) != 0 {
		t.Errorf("a failure left %v", entries)
	}
	return path, err
}

func TestAProgramIsFetchedAndExecutable(t *testing.T) {
	s := serve(t, false, text(program))
	for _, digest := range []string{"", sum(program)} {
		path, err := fetch(t, s.URL, digest, quick)
		found, _ := os.ReadFile(path)
		info, statErr := os.Stat(path)
		if err != nil || string(found) != program || statErr != nil || info.Mode() != 0o700 {
			t.Errorf("%v %q %v", err, found, info)
		}
	}
}

func TestAProgramThatIsThereIsNotFetchedAgain(t *testing.T) {
	s := serve(t, false, text(program))
	path := filepath.Join(t.TempDir(), "agent")
	for range 3 {
		if err := Fetch(context.Background(), Order{s.URL, sum(program), path}, quick); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.requests.Load(); n != 1 {
		t.Errorf("fetched %d times", n)
	}
	os.WriteFile(path, []byte("changed"), 0o700)
	if err := Fetch(context.Background(), Order{s.URL, sum(program), path}, quick); err != nil || s.requests.Load() != 2 {
		t.Errorf("%v, fetched %d times", err, s.requests.Load())
	}
	if err := Fetch(context.Background(), Order{s.URL, "", path}, quick); err != nil || s.requests.Load() != 3 {
		t.Errorf("%v, fetched %d times", err, s.requests.Load())
	}
}

func TestTheWrongDigestKeepsWhatIsThere(t *testing.T) {
	s := serve(t, false, text(program))
	path := filepath.Join(t.TempDir(), "agent")
	os.WriteFile(path, []byte("old"), 0o700)
	err := Fetch(context.Background(), Order{s.URL + "/x?token=hidden", sum("other"), path}, quick)
	if err == nil || !strings.Contains(err.Error(), "its sha256 is "+sum(program)) || strings.Contains(err.Error(), "hidden") {
		t.Errorf("%v", err)
	}
	if found, _ := os.ReadFile(path); string(found) != "old" || s.requests.Load() != 1 {
		t.Errorf("%q after %d requests", found, s.requests.Load())
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left %v", entries)
	}
}

func TestFailuresThatMayPassAreTriedAgain(t *testing.T) {
	cut := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, "short")
	}
	for name, failure := range map[string]http.HandlerFunc{"503": status(503), "429": status(429), "408": status(408), "cut short": cut} {
		s := serve(t, false, failure, failure, text(program))
		if _, err := fetch(t, s.URL, sum(program), quick); err != nil || s.requests.Load() != 3 {
			t.Errorf("%s: %v after %d requests", name, err, s.requests.Load())
		}
		s = serve(t, false, failure)
		if _, err := fetch(t, s.URL, "", quick); err == nil || s.requests.Load() != 3 {
			t.Errorf("%s: %v after %d requests", name, err, s.requests.Load())
		}
	}
}

func TestFailuresThatLastAreNotTriedAgain(t *testing.T) {
	loop := func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) }
	for name, c := range map[string]struct {
		handler  http.HandlerFunc
		requests int64
		words    string
	}{
		"404":       {status(404), 1, "404"},
		"403":       {status(403), 1, "403"},
		"204":       {status(204), 1, "204"},
		"too large": {text(strings.Repeat("x", 1<<20+1)), 1, "more than 1048576 bytes"},
		"a loop":    {loop, maxRedirects + 1, "redirected more than 10 times"},
	} {
		s := serve(t, false, c.handler)
		_, err := fetch(t, s.URL, "", quick)
		if err == nil || !strings.Contains(err.Error(), c.words) || s.requests.Load() != c.requests {
			t.Errorf("%s: %v after %d requests", name, err, s.requests.Load())
		}
	}
}

func TestAnEndlessBodyIsCutAtTheLimit(t *testing.T) {
	s := serve(t, false, func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	})
	if _, err := fetch(t, s.URL, "", quick); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
}

func TestASilentServerIsGivenUp(t *testing.T) {
	silent := func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "a little")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	s := serve(t, false, silent)
	limits := quick
	limits.Idle, limits.Pauses = 50*time.Millisecond, nil
	if _, err := fetch(t, s.URL, "", limits); err == nil || !strings.Contains(err.Error(), "nothing came for 50ms") {
		t.Error(err)
	}
	limits = quick
	limits.Total = 50 * time.Millisecond
	if _, err := fetch(t, s.URL, "", limits); err == nil || !strings.Contains(err.Error(), "not complete after 50ms") {
		t.Error(err)
	}
}

func TestAFetchEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s := serve(t, false, func(_ http.ResponseWriter, r *http.Request) { cancel(); <-r.Context().Done() })
	if err := Fetch(ctx, Order{URL: s.URL, Path: filepath.Join(t.TempDir(), "a")}, quick); err == nil {
		t.Error("no error")
	}
}

func trust(t *testing.T, s *site) {
	path := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	os.WriteFile(path, block, 0o644)
	t.Setenv("SSL_CERT_FILE", path)
}

func TestHTTPSNeedsACertificateOfTheMachinesAuthorities(t *testing.T) {
	s, other := serve(t, true, text(program)), serve(t, false, text(program))
	trust(t, s)
	if _, err := fetch(t, s.URL, "", quick); err != nil {
		t.Error(err)
	}
	down := serve(t, true, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, http.StatusFound) })
	if _, err := fetch(t, down.URL, "", quick); err == nil || !strings.Contains(err.Error(), "from https to http") {
		t.Error(err)
	}
	up := serve(t, false, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, s.URL, http.StatusFound) })
	if _, err := fetch(t, up.URL, "", quick); err != nil {
		t.Error(err)
	}
}

func TestACertificateOfNobodyIsRefused(t *testing.T) {
	s := serve(t, true, text(program))
	path := filepath.Join(t.TempDir(), "none.pem")
	bundlesBefore, foldersBefore := bundles, folders
	t.Cleanup(func() { bundles, folders = bundlesBefore, foldersBefore })
	bundles, folders = nil, nil
	t.Setenv("SSL_CERT_FILE", path)
	if _, err := fetch(t, s.URL, "", quick); err == nil || !strings.Contains(err.Error(), "install ca-certificates") {
		t.Error(err)
	}
	folders = []string{t.TempDir()}
	other := serve(t, true, text(program))
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Certificate().Raw})
	os.WriteFile(folders[0]+"/ca.pem", block, 0o644)
	if _, err := fetch(t, other.URL, "", quick); err != nil {
		t.Error(err) // found in a folder
	}
	_, err := fetch(t, strings.Replace(other.URL, "127.0.0.1", "localhost", 1), "", quick)
	if err == nil || !strings.Contains(err.Error(), "not trusted") || other.requests.Load() != 1 {
		t.Error(err)
	}
}

func TestURLs(t *testing.T) {
	for url, good := range map[string]bool{
		"http://a/b": true, "https://a:1/b?c": true, "ftp://a": false, "a": false, "http://": false, "http://u:p@a/": false,
		"file:///etc/passwd": false, "": false, "http://[::1": false,
	} {
		if (CheckURL(url) == nil) != good {
			t.Errorf("%q: %v", url, CheckURL(url))
		}
	}
}
