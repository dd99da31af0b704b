package setup

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"fused/internal/fault"
	"fused/internal/files"
)

const (
	secretMode       = uint32(0o600)
	secretFolderMode = uint32(0o700)
	folderMode       = uint32(0o755)
)

// Keeper knows the machine's setup.
type Keeper struct {
	folder  string // "": this agent has none
	changed func()

	applying sync.Mutex

	mu      sync.Mutex
	id      string
	secrets []string // names that a setup has written below the folder
	env     map[string]string
	workdir string
}

// New makes a keeper. changed is called when a setup has been applied.
func New(folder string, changed func()) *Keeper { return &Keeper{folder: folder, changed: changed} }

// ID is that of the last setup that was applied as a whole; "" for none.
func (k *Keeper) ID() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.id
}

// Defaults are the variables and the working directory that commands get. The
// map must not be changed.
func (k *Keeper) Defaults() (env map[string]string, workdir string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.env, k.workdir
}

// writing is one file whose place and content are known to be good.
type writing struct {
	shown string // the path as the client knows it
	place string
	data  []byte
	mode  *uint32
	fuse  bool
}

// Apply makes the machine what the body says, once per id. Everything is checked
// before the first file is written.
func (k *Keeper) Apply(body Body) error {
	k.applying.Lock()
	defer k.applying.Unlock()
	if err := body.check(); err != nil {
		return err
	}
	if body.ID == k.ID() {
		return nil
	}
	plan, err := k.plan(body)
	if err != nil {
		return err
	}
	workdir, err := k.prepareWorkdir(body.Workdir)
	if err != nil {
		return err
	}
	k.forget(body.Fuse)
	for _, w := range plan {
		if err := k.write(w); err != nil {
			return err
		}
	}
	k.mu.Lock()
	k.id, k.env, k.workdir = body.ID, maps.Clone(body.Env), workdir
	k.mu.Unlock()
	k.changed()
	return nil
}

func (k *Keeper) plan(body Body) ([]writing, error) {
	if len(body.Fuse) > 0 && k.folder == "" {
		return nil, fault.New("not_supported", "this agent has no folder for secrets; it does not run as a machine's first process")
	}
	var plan []writing
	for _, name := range slices.Sorted(maps.Keys(body.Fuse)) {
		if err := checkName(name); err != nil {
			return nil, err
		}
		secret := secretMode
		w, err := newWriting("fuse."+name, body.Fuse[name], &secret)
		if err != nil {
			return nil, err
		}
		w.shown, w.place, w.fuse = name, filepath.Join(k.folder, name), true
		plan = append(plan, w)
	}
	for _, path := range slices.Sorted(maps.Keys(body.Files)) {
		w, err := newWriting("files."+path, body.Files[path], nil)
		if err != nil {
			return nil, err
		}
		w.shown = path
		if w.place, err = k.place(path); err != nil {
			return nil, fault.OnPath(path, err)
		}
		if info, err := os.Stat(w.place); err == nil && info.IsDir() {
			return nil, fault.OnPath(path, syscall.EISDIR)
		}
		plan = append(plan, w)
	}
	return plan, nil
}

func newWriting(field string, file File, mode *uint32) (writing, error) {
	data, err := file.content(field)
	if err != nil {
		return writing{}, err
	}
	mode, err = file.mode(mode)
	return writing{data: data, mode: mode}, err
}

func (k *Keeper) prepareWorkdir(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	place, err := k.place(path)
	if err == nil {
		err = files.MakeFolders(place, folderMode, self())
	}
	return place, fault.OnPath(path, err)
}

// forget removes what the setup before has left in the folder and this one does
// not name, so that a secret that was withdrawn is gone.
func (k *Keeper) forget(named map[string]File) {
	k.mu.Lock()
	old := k.secrets
	k.secrets = slices.Collect(maps.Keys(named))
	k.mu.Unlock()
	for _, name := range old {
		if _, stays := named[name]; stays {
			continue
		}
		os.Remove(filepath.Join(k.folder, name))
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			if os.Remove(filepath.Join(k.folder, dir)) != nil {
				break // not empty
			}
		}
	}
}

func (k *Keeper) write(w writing) error {
	target := files.Target{Mode: w.mode, Parents: true}
	var err error
	if w.fuse {
		owner := self()
		target.Owner, target.Parents = &owner, false
		err = k.makeSecretFolders(w.shown)
	}
	if err == nil {
		_, err = files.Write(w.place, target, bytes.NewReader(w.data))
	}
	if w.fuse && errors.Is(err, syscall.ENOSPC) {
		path := filepath.Join(k.folder, w.shown)
		return fault.New("no_space_in_guest", path+" does not fit: the folder is memory, at most half of the machine's; send less, or ask for more ram_mb", "path", path)
	}
	return fault.OnPath(w.shown, err)
}

// makeSecretFolders makes the parents of a name. A link below the folder that
// leads out of it is not followed: it is replaced.
func (k *Keeper) makeSecretFolders(name string) error {
	path := k.folder
	parts := strings.Split(name, "/")
	for _, part := range parts[:len(parts)-1] {
		path = filepath.Join(path, part)
		removeLink(path)
		if err := files.MakeFolders(path, secretFolderMode, self()); err != nil {
			return err
		}
	}
	removeLink(filepath.Join(k.folder, name))
	return nil
}

func removeLink(path string) {
	if _, err := os.Readlink(path); err == nil {
		os.Remove(path)
	}
}

// self is root in a machine.
func self() files.Owner {
	return files.Owner{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}
