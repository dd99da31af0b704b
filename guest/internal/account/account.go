// Package account finds users and groups in /etc/passwd and /etc/group by
// hand: os/user would need cgo or miss what images really contain.
package account

import (
	"bufio"
	"os"
	"slices"
	"strconv"
	"strings"

	"fused/internal/fault"
)

// User is who a command runs as.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32
	Home   string
}

// Database names the two files; tests use their own.
type Database struct {
	Passwd string
	Group  string
}

// System is the machine's own database.
var System = Database{Passwd: "/etc/passwd", Group: "/etc/group"}

type passwdEntry struct {
	name     string
	uid, gid uint32
	home     string
}

// Find resolves "name", "uid", "name:group" or "uid:gid"; "" is root. Numbers
// need no files. A number without an entry has group 0, as in OCI runtimes.
func (d Database) Find(spec string) (User, error) {
	if spec == "" {
		spec = "root"
	}
	name, group, withGroup := strings.Cut(spec, ":")
	user, err := d.findUser(name, spec)
	if err != nil {
		return User{}, err
	}
	if withGroup {
		gid, found := d.findGroup(group)
		if !found {
			return User{}, unknown(spec, "the group of user "+spec+" is not in /etc/group; use a number")
		}
		// A group that was asked for replaces the user's own ones.
		user.GID, user.Groups = gid, []uint32{gid}
	}
	return user, nil
}

func (d Database) findUser(name, spec string) (User, error) {
	number, numeric := parseID(name)
	entry, found := d.passwd(func(e passwdEntry) bool {
		return e.name == name || (numeric && e.uid == number)
	})
	switch {
	case found:
		user := User{Name: entry.name, UID: entry.uid, GID: entry.gid, Home: entry.home}
		user.Groups = d.groupsOf(entry.name, entry.gid)
		return user, nil
	case numeric:
		return User{Name: name, UID: number, Groups: []uint32{0}, Home: homeWithoutEntry(number)}, nil
	case name == "root":
		return User{Name: "root", Groups: []uint32{0}, Home: homeWithoutEntry(0)}, nil
	}
	return User{}, unknown(spec, "user "+spec+" is not in /etc/passwd; use a number or create the user")
}

func unknown(spec, text string) error { return fault.New("unknown_user", text, "user", spec) }

func homeWithoutEntry(uid uint32) string {
	if info, err := os.Stat("/root"); uid == 0 && err == nil && info.IsDir() {
		return "/root"
	}
	return "/"
}

func (d Database) passwd(match func(passwdEntry) bool) (passwdEntry, bool) {
	var result passwdEntry
	found := eachLine(d.Passwd, func(fields []string) bool {
		if len(fields) < 6 {
			return false
		}
		uid, okUID := parseID(fields[2])
		gid, okGID := parseID(fields[3])
		result = passwdEntry{fields[0], uid, gid, fields[5]}
		if result.home == "" {
			result.home = "/"
		}
		return okUID && okGID && match(result)
	})
	return result, found
}

func (d Database) findGroup(name string) (uint32, bool) {
	if number, numeric := parseID(name); numeric {
		return number, true
	}
	var gid uint32
	found := eachLine(d.Group, func(fields []string) bool {
		var ok bool
		if len(fields) >= 3 && fields[0] == name {
			gid, ok = parseID(fields[2])
		}
		return ok
	})
	return gid, found
}

// groupsOf returns the primary group and those that list the user as member.
func (d Database) groupsOf(name string, primary uint32) []uint32 {
	groups := []uint32{primary}
	eachLine(d.Group, func(fields []string) bool {
		if len(fields) >= 4 && slices.Contains(strings.Split(fields[3], ","), name) {
			if gid, ok := parseID(fields[2]); ok && !slices.Contains(groups, gid) {
				groups = append(groups, gid)
			}
		}
		return false
	})
	return groups
}

// eachLine calls visit with the fields of each line until it says true.
func eachLine(path string, visit func([]string) bool) bool {
	file, err := os.Open(path)
	if err != nil {
		return false // an image without the file has no names, that is all
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20) // groups can have many members
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && line[0] != '#' && visit(strings.Split(line, ":")) {
			return true
		}
	}
	return false
}

func parseID(text string) (uint32, bool) {
	// The highest number means "no id" to the kernel.
	id, err := strconv.ParseUint(text, 10, 32)
	return uint32(id), err == nil && id != 1<<32-1
}
