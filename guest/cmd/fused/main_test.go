package main

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"serve"}, {"serve", "--tcp", "x"}, {"version", "x"}} {
		if err := run(args); err == nil || !strings.HasPrefix(err.Error(), "usage: ") {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestServeOnAUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	go run([]string{"serve", "--unix", path})
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", path) },
	}}
	var err error
	for until := time.Now().Add(10 * time.Second); time.Now().Before(until); time.Sleep(2 * time.Millisecond) {
		var response *http.Response
		if response, err = client.Get("http://guest/health"); err == nil {
			response.Body.Close()
			return
		}
	}
	t.Fatal(err)
}
