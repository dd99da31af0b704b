#!/bin/sh
# Make this source folder ready: system packages, .venv, the project in it with the guest agent.
#
#   tools/setup.sh run        what `fuse` needs to run
#   tools/setup.sh console    the same, and what `fuse console` needs
#   tools/setup.sh dev        the same, and what checks and tests need (default)
#
# Safe to repeat: a step whose inputs (by content) have not changed is skipped. Packages come from wherever this
# machine's apt and pip are configured to take them. PYTHON names another interpreter (3.11 or newer).
set -eu

mode=${1:-dev}
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=$root/.venv
stamps=$venv/.setup
log=$root/.cache/setup.log
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# What must be there (a program, or a file when it starts with /), and the Debian or Ubuntu package that brings it.
needs='
qemu-system-x86_64 qemu-system-x86
qemu-img qemu-utils
mmdebstrap mmdebstrap
/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
mke2fs e2fsprogs
debugfs e2fsprogs
nft nftables
ip iproute2
depmod kmod
xz xz-utils
zstd zstd
skopeo skopeo
lz4 lz4
setpriv util-linux
unshare util-linux
mount mount
newuidmap uidmap
/etc/ssl/certs/ca-certificates.crt ca-certificates
'
# The same for checks and tests: a file system that shares blocks, the browser in which the console is tested, and what
# drives it.
test_needs='
/bin/busybox busybox-static
mkfs.xfs xfsprogs
chromium chromium
chromedriver chromium-driver
'

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup: $*"; exit 1; }

# step TEXT COMMAND...: run a long command with its output in the log; on failure show the log's end.
step() {
    say "setup: $1 ..."
    shift
    mkdir -p "${log%/*}"
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null && return
    status=$?
    tail -n 25 "$log" >&2
    fail "this failed with status $status: $* (all output: $log)"
}

# fingerprint FILE...: one hash over the contents of files and folders.
fingerprint() {
    (cd "$root" && find "$@" -type f ! -name '*_test.go' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-64)
}

is_done() { [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }
mark_done() { mkdir -p "$stamps" && printf '%s\n' "$2" >"$stamps/$1"; }

find_python() {
    for candidate in ${PYTHON:-/usr/bin/python3 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3 (found: $(python3 -V 2>&1 || true))"
}

# missing_packages: the packages whose program or file is not there, each once.
missing_packages() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    [ "$mode" = dev ] || test_needs=
    echo "$needs$test_needs" | while read -r thing package; do
        case $thing in
        '') ;;
        /*) [ -e "$thing" ] || echo "$package" ;;
        *) command -v "$thing" >/dev/null || echo "$package" ;;
        esac
    done | sort -u
}

install_system_packages() {
    missing=$(missing_packages | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    install="apt-get install -y --no-install-recommends $missing"
    command -v apt-get >/dev/null || fail "these packages (Debian's names) are missing and there is no apt-get: $missing"
    if [ "$(id -u)" = 0 ]; then
        become=env
    elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
        say "setup: sudo is used to install: $missing"
        sudo -v || fail "sudo refused; install the packages yourself:  sudo $install"
        become='sudo env'
    else
        fail "these system packages are missing: $missing
Run this as root, then repeat:  apt-get update && $install"
    fi
    # shellcheck disable=SC2086 # words on purpose
    set -- $become DEBIAN_FRONTEND=noninteractive
    step "reading the package lists" "$@" apt-get -q update
    # shellcheck disable=SC2086
    step "installing $missing" "$@" $install
    hash -r
    missing=$(missing_packages | tr '\n' ' ')
    [ -z "$missing" ] || fail "still missing after the installation: $missing"
}

# fetch_server PACKAGE PROGRAM...: tests ask real servers. Unpacked beside other caches: the packages would start services.
fetch_server() {
    package=$1
    shift
    folder=${XDG_CACHE_HOME:-$HOME/.cache}/fuse/$package
    is_there=yes
    for program; do
        [ -x "$folder/$program" ] || command -v "$program" >/dev/null || is_there=no
    done
    [ $is_there = no ] || return 0
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        say "setup: there is no apt-get to fetch $package with; its tests will be skipped"
        return
    fi
    if [ "$(id -u)" = 0 ] && ! apt-cache show "$package" >/dev/null 2>&1; then
        step "reading the package lists" apt-get -q update
    fi
    fresh=$(mktemp -d)
    say "setup: fetching $package for its tests ..."
    mkdir -p "${log%/*}"
    if (cd "$fresh" && apt-get -q download "$package" && dpkg-deb -x "$package"_*.deb .) >>"$log" 2>&1 </dev/null; then
        mkdir -p "$folder"
        for program; do mv -f "$fresh/usr/bin/$program" "$folder/"; done
    else
        say "setup: $package cannot be fetched; its tests will be skipped (output: $log)"
    fi
    rm -rf "$fresh"
}

make_venv() {
    # A venv of another interpreter, or of a folder that was moved, does not work.
    if [ -d "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
    fi
    [ -d "$venv" ] || step "making .venv with $python" "$python" -m venv "$venv"
}

# requirement_files MODE: what a mode installs. dev.txt includes console.txt.
requirement_files() {
    echo requirements/build.txt requirements/run.txt
    [ "$1" = run ] || echo "requirements/$1.txt"
}

# requirements_key MODE: changes with the files, and with the interpreter.
requirements_key() {
    # shellcheck disable=SC2046 # words on purpose
    echo "$1 $(fingerprint $(requirement_files "$1")) $("$venv/bin/python" -V)"
}

install_requirements() {
    is_done "requirements-$mode" "$(requirements_key "$mode")" && return
    files=$(requirement_files "$mode" | sed 's/requirements/-r &/g')
    # shellcheck disable=SC2086
    step "installing the packages of requirements/$mode.txt" \
        "$venv/bin/python" -m pip install --quiet --require-hashes --only-binary=:all: $files
    # What tests the project includes what runs it.
    for included in run console dev; do
        mark_done "requirements-$included" "$(requirements_key "$included")"
        [ "$included" != "$mode" ] || break
    done
}

install_project() {
    key="$(fingerprint pyproject.toml hatch_build.py guest) $(cat "$root"/.cache/fused.json 2>/dev/null || true)"
    if is_done project "$key" && [ -x src/fusevm/host/guest/fused-amd64 ] && [ -x "$venv/bin/fuse" ]; then return; fi
    step "installing the project and building the guest agent" \
        "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    mark_done project "$(fingerprint pyproject.toml hatch_build.py guest) $(cat "$root"/.cache/fused.json)"
}

case $mode in run | console | dev) ;; *) fail "usage: tools/setup.sh [run|console|dev]" ;; esac
cd "$root"
python=$(find_python)
install_system_packages
make_venv
install_requirements
install_project
if [ "$mode" = dev ]; then
    fetch_server prometheus prometheus promtool
    fetch_server docker-registry docker-registry
fi
say "setup: ready ($mode)"
