// Package healthcheck asks again and again whether what runs in the machine is
// well. docs/guest-protocol.md, section 6.7.
package healthcheck

import (
	"net/url"
	"strconv"
	"strings"
	"time"

	"fused/internal/fault"
)

const (
	maxSeconds = 24 * 60 * 60
	maxRetries = 1000
)

// HTTP is a GET on loopback.
type HTTP struct {
	Port int    `json:"port"`
	Path string `json:"path"`
}

// Body is what PUT /healthcheck takes. Nil is the default.
type Body struct {
	HTTP               *HTTP    `json:"http"`
	Exec               []string `json:"exec"`
	IntervalSeconds    *int     `json:"interval_seconds"`
	TimeoutSeconds     *int     `json:"timeout_seconds"`
	Retries            *int     `json:"retries"`
	StartPeriodSeconds *int     `json:"start_period_seconds"`
}

// Plan is a complete health check: exactly one of URL and Exec is set.
type Plan struct {
	URL         string
	Exec        []string
	Interval    time.Duration
	Timeout     time.Duration
	Retries     int
	StartPeriod time.Duration
}

// Plan completes and checks the body; nil when it asks for nothing.
func (b Body) Plan() (*Plan, error) {
	if b.HTTP == nil && len(b.Exec) == 0 {
		return nil, nil
	}
	if b.HTTP != nil && len(b.Exec) > 0 {
		return nil, fault.BadRequest("http", "give one of http and exec, not both")
	}
	interval, err := number("interval_seconds", b.IntervalSeconds, 10, 1, maxSeconds)
	if err != nil {
		return nil, err
	}
	timeout, err := number("timeout_seconds", b.TimeoutSeconds, min(2, interval), 1, interval)
	if err != nil {
		return nil, err
	}
	retries, err := number("retries", b.Retries, 3, 1, maxRetries)
	if err != nil {
		return nil, err
	}
	startPeriod, err := number("start_period_seconds", b.StartPeriodSeconds, 0, 0, maxSeconds)
	if err != nil {
		return nil, err
	}
	plan := &Plan{
		Exec: b.Exec, Interval: time.Duration(interval) * time.Second, Timeout: time.Duration(timeout) * time.Second,
		Retries: retries, StartPeriod: time.Duration(startPeriod) * time.Second,
	}
	if b.HTTP != nil {
		plan.URL, err = b.HTTP.url()
		return plan, err
	}
	for _, word := range b.Exec {
		if b.Exec[0] == "" || strings.ContainsRune(word, 0) {
			return nil, fault.BadRequest("exec", "exec must begin with a program's name and not contain NUL")
		}
	}
	return plan, nil
}

func number(field string, value *int, otherwise, least, most int) (int, error) {
	if value == nil {
		return otherwise, nil
	}
	if *value < least || *value > most {
		return 0, fault.BadRequest(field, field+" must be between "+strconv.Itoa(least)+" and "+strconv.Itoa(most))
	}
	return *value, nil
}

func (h *HTTP) url() (string, error) {
	if h.Port < 1 || h.Port > 65535 {
		return "", fault.BadRequest("http.port", "http.port must be between 1 and 65535")
	}
	path := h.Path
	if path == "" {
		path = "/"
	}
	text := "http://127.0.0.1:" + strconv.Itoa(h.Port) + path
	parsed, err := url.Parse(text)
	if err != nil || !strings.HasPrefix(path, "/") || parsed.Hostname() != "127.0.0.1" || parsed.Fragment != "" {
		return "", fault.BadRequest("http.path", "http.path must begin with / and be the path of a URL")
	}
	return text, nil
}
