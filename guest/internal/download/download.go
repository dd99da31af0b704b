// Package download fetches one program over HTTP or HTTPS, by the machine's own
// network, and puts it in its place only when it is whole and the right one.
package download

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"fused/internal/fault"
	"fused/internal/files"
)

const (
	maxRedirects = 10
	dialTimeout  = 10 * time.Second
	programMode  = 0o700
)

// Limits bound one fetch.
type Limits struct {
	Bytes  int64
	Total  time.Duration
	Idle   time.Duration   // without a byte
	Pauses []time.Duration // between attempts; one more attempt than pauses
}

// Usual are the limits of docs/guest-protocol.md, section 6.3.
var Usual = Limits{
	Bytes: 1 << 30, Total: 5 * time.Minute, Idle: 30 * time.Second,
	Pauses: []time.Duration{time.Second, 2 * time.Second, 4 * time.Second},
}

// Order says what to fetch, and where to.
type Order struct {
	URL    string
	SHA256 string // hexadecimal; "": not checked
	Path   string
}

// lasting is a failure that another attempt would meet again.
type lasting struct{ error }

func (l lasting) Unwrap() error { return l.error }

// CheckURL says whether a text is something to fetch from.
func CheckURL(text string) error {
	parsed, err := url.Parse(text)
	if err != nil || parsed.Host == "" || parsed.User != nil || (parsed.Scheme != "http" && parsed.Scheme != "https") {
		return fault.BadRequest("download_url", "download_url must be http://... or https://... with a host and without a user")
	}
	return nil
}

// Fetch puts the program at its path, executable. What is there already with the
// wanted digest is left alone. On failure the path is as it was; the error says
// why in a sentence, without the URL's query, which may be a secret.
func Fetch(ctx context.Context, order Order, limits Limits) error {
	if order.SHA256 != "" && digestOf(order.Path) == order.SHA256 {
		return os.Chmod(order.Path, programMode)
	}
	ctx, cancel := context.WithTimeout(ctx, limits.Total)
	defer cancel()
	for attempt := 0; ; attempt++ {
		err := fetchOnce(ctx, order, limits)
		if err == nil || errors.As(err, new(lasting)) || attempt == len(limits.Pauses) || !pause(ctx, limits.Pauses[attempt]) {
			return describe(ctx, order, limits, err)
		}
	}
}

func pause(ctx context.Context, length time.Duration) bool {
	timer := time.NewTimer(length)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func describe(ctx context.Context, order Order, limits Limits, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("it was not complete after %v", limits.Total)
	}
	var inURL *url.Error
	if errors.As(err, &inURL) { // its text repeats the whole URL
		err = inURL.Err
	}
	where := "the download"
	if parsed, parseErr := url.Parse(order.URL); parseErr == nil {
		where += " from " + parsed.Scheme + "://" + parsed.Host + parsed.EscapedPath()
	}
	return fmt.Errorf("%s failed: %w", where, err)
}

func fetchOnce(ctx context.Context, order Order, limits Limits) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	idle := time.AfterFunc(limits.Idle, func() { cancel(fmt.Errorf("nothing came for %v", limits.Idle)) })
	defer idle.Stop()
	err := receive(ctx, order, limits, func() { idle.Reset(limits.Idle) })
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

func receive(ctx context.Context, order Order, limits Limits, alive func()) error {
	client, err := newClient(order.URL)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, order.URL, nil)
	if err != nil {
		return lasting{err}
	}
	response, err := client.Do(request)
	if err != nil {
		return classify(err)
	}
	defer response.Body.Close()
	if err := checkStatus(response); err != nil {
		return err
	}
	if response.ContentLength > limits.Bytes {
		return lasting{tooLarge(limits)}
	}
	return save(order, limits, &lively{response.Body, alive})
}

// newClient makes a client that leaves nothing behind. Certificates are only
// needed, and only missed, where something is encrypted; a redirect from http
// to https needs them, too.
func newClient(target string) (*http.Client, error) {
	roots, err := systemRoots()
	if err != nil {
		if strings.HasPrefix(strings.ToLower(target), "https:") {
			return nil, lasting{err}
		}
		roots = x509.NewCertPool()
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout: dialTimeout,
			DisableKeepAlives:   true,
			DisableCompression:  true, // the bytes as they are stored
		},
		CheckRedirect: checkRedirect,
	}, nil
}

func checkRedirect(next *http.Request, before []*http.Request) error {
	switch {
	case len(before) > maxRedirects:
		return lasting{errors.New("it is redirected more than " + strconv.Itoa(maxRedirects) + " times")}
	case next.URL.Scheme != "https" && before[len(before)-1].URL.Scheme == "https":
		return lasting{errors.New("it is redirected from https to " + next.URL.Scheme)}
	}
	return nil
}

// classify tells what another attempt cannot change.
func classify(err error) error {
	var verification *tls.CertificateVerificationError
	if errors.As(err, &verification) {
		return lasting{fmt.Errorf("its certificate is not trusted: %w", verification.Err)}
	}
	return err
}

func checkStatus(response *http.Response) error {
	err := errors.New("the server answered " + response.Status)
	switch code := response.StatusCode; {
	case code == http.StatusOK:
		return nil
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooEarly, code == http.StatusTooManyRequests:
		return err
	}
	return lasting{err}
}

func tooLarge(limits Limits) error {
	return fmt.Errorf("it has more than %d bytes", limits.Bytes)
}

// lively tells of every byte that comes.
type lively struct {
	io.Reader
	alive func()
}

func (l *lively) Read(p []byte) (int, error) {
	n, err := l.Reader.Read(p)
	if n > 0 {
		l.alive()
	}
	return n, err
}

func save(order Order, limits Limits, body io.Reader) error {
	file, err := os.CreateTemp(filepath.Dir(order.Path), ".fuse-*.tmp")
	if err != nil {
		return lasting{err}
	}
	err = fill(file, order, limits, body)
	if closing := file.Close(); err == nil && closing != nil {
		err = lasting{closing}
	}
	if err == nil {
		if err = os.Rename(file.Name(), order.Path); err != nil {
			err = lasting{err}
		}
	}
	if err != nil {
		os.Remove(file.Name())
	}
	return err
}

func fill(file *os.File, order Order, limits Limits, body io.Reader) error {
	digest := sha256.New()
	size, err := files.Copy(io.MultiWriter(file, digest), io.LimitReader(body, limits.Bytes+1))
	found := hex.EncodeToString(digest.Sum(nil))
	switch {
	case errors.Is(err, syscall.ENOSPC):
		return lasting{fmt.Errorf("it does not fit into %s, which is memory: at most half of the machine's; ask for more ram_mb", filepath.Dir(order.Path))}
	case err != nil:
		return fmt.Errorf("it was cut short after %d bytes: %w", size, err)
	case size > limits.Bytes:
		return lasting{tooLarge(limits)}
	case order.SHA256 != "" && found != order.SHA256:
		return lasting{fmt.Errorf("its sha256 is %s, not %s", found, order.SHA256)}
	}
	if err := file.Chmod(programMode); err != nil {
		return lasting{err}
	}
	return nil
}

// digestOf is "" for what cannot be read.
func digestOf(path string) string {
	file, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer file.Close()
	digest := sha256.New()
	if _, err := files.Copy(digest, file); err != nil {
		return ""
	}
	return hex.EncodeToString(digest.Sum(nil))
}
