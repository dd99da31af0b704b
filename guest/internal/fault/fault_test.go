package fault

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

func TestErrnosHaveTheirReasons(t *testing.T) {
	for errno, want := range map[syscall.Errno]string{
		syscall.ENOENT: "file_not_found", syscall.EISDIR: "is_a_directory", syscall.ENOTDIR: "not_a_directory",
		syscall.ENOTEMPTY: "directory_not_empty", syscall.EEXIST: "file_exists", syscall.EACCES: "permission_denied",
		syscall.EPERM: "permission_denied", syscall.EROFS: "permission_denied", syscall.ENOSPC: "no_space_in_guest",
		syscall.EDQUOT: "no_space_in_guest", syscall.EIO: "agent_failure",
	} {
		err := OnPath("/x", fmt.Errorf("wrapped: %w", &fs.PathError{Op: "open", Path: "/x", Err: errno}))
		f := Of(err)
		if f.Reason != want || f.Code != codes[want] || f.Status() == 0 {
			t.Errorf("%v: %+v", errno, f)
		}
		if want == "agent_failure" {
			if !strings.Contains(f.Text, fmt.Sprint(int(errno))) {
				t.Errorf("the errno is not in %q", f.Text)
			}
		} else if f.Details["path"] != "/x" {
			t.Errorf("%v: no path", errno)
		}
	}
}

func TestFaultsPassThrough(t *testing.T) {
	original := New("bad_cwd", "text", "cwd", "/x")
	if got := OnPath("/y", fmt.Errorf("more: %w", original)); Of(got) != original {
		t.Error(got)
	}
	if OnPath("/x", nil) != nil {
		t.Error("nil became an error")
	}
	if f := Of(&http.MaxBytesError{Limit: 5}); f.Status() != 413 || f.Details["limit_bytes"] != "5" {
		t.Errorf("%+v", f)
	}
	if f := Of(errors.New("odd")); f.Status() != 500 || f.Reason != "agent_failure" {
		t.Errorf("%+v", f)
	}
}

func TestTheBody(t *testing.T) {
	var body struct {
		Error, Code string
		Details     map[string]string
	}
	if err := json.Unmarshal(New("unknown_user", "no such user", "user", "x").Body(), &body); err != nil {
		t.Fatal(err)
	}
	if body.Error != "no such user" || body.Code != "invalid_argument" || body.Details["reason"] != "unknown_user" || body.Details["user"] != "x" {
		t.Errorf("%+v", body)
	}
}

func TestEveryReasonHasACodeWithAStatus(t *testing.T) {
	for reason, code := range codes {
		if status[code] == 0 {
			t.Errorf("%s: %s", reason, code)
		}
	}
}
