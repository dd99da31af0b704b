#!/bin/sh
# Make this server run Fuse: put the program of this source folder into /opt/fuse, then let it install the rest.
#
#   sudo deploy/install.sh [install|upgrade] [OPTION...]      the options are those of `fuse host install`
#   sudo deploy/install.sh uninstall [OPTION...]              those of `fuse host uninstall`
#
# Safe to repeat. Every version has a folder of its own, so that services run the old one until the new one is whole.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }
say() { printf 'install: %s\n' "$*" >&2; }
# quietly COMMAND...: its output is shown only when it fails.
quietly() {
    output=$("$@" 2>&1 </dev/null) || { printf '%s\n' "$output" >&2; fail "this failed: $*"; }
}
# packaged COMMAND...: apt or dpkg, after one that is at work, such as one that outlives a killed run. Not left to
# DPkg::Lock::Timeout: dpkg itself does not know it, and apt waits so for dpkg's lock only, not for that of its lists.
packaged() {
    ends=$(($(date +%s) + 600))
    until output=$(env LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@" 2>&1 </dev/null); do
        case $output in *"Could not get lock"* | *"locked by another process"*) ;; *) ends=0 ;; esac
        [ "$(date +%s)" -lt "$ends" ] || { printf '%s\n' "$output" >&2; fail "this failed: $*"; }
        say "waiting for another apt or dpkg"
        sleep 2
    done
}
# Is there a Python that makes virtual environments, of whose packages a killed run has left none half configured?
is_python_whole() {
    python3 -c 'import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return
    ! dpkg-query -W -f '${db:Status-Status}\n' '*python3*' 2>/dev/null |
        grep -Evqx 'installed|not-installed|config-files'
}

# Is a folder of this name one that this script has made?
is_ours() {
    name=${1%.build}
    case $name in *[!0-9a-f]*) return 1 ;; esac
    [ "${#name}" -eq 12 ]
}

[ "$(id -u)" = 0 ] || fail "root is needed: sudo $0 $*"
command -v apt-get >/dev/null || fail "Debian or Ubuntu is needed: there is no apt-get"
case ${1:-} in install | upgrade | uninstall) action=$1; shift ;; *) action=install ;; esac

if [ "$action" = uninstall ]; then
    linked=$(readlink /usr/local/bin/fuse || :)
    case $linked in /opt/fuse/*) ;; *) linked='' ;; esac
    for program in "$linked" /opt/fuse/*/bin/fuse; do
        [ ! -x "$program" ] || exec "$program" host uninstall "$@"
    done
    # The program goes last: one that was killed then has left nothing but parts of itself.
    say "removing what is left of the program"
    [ -z "$linked" ] || rm -f /usr/local/bin/fuse
    for folder in /opt/fuse/*; do ! is_ours "${folder##*/}" || rm -rf "$folder"; done
    rm -rf /opt/fuse/.*.removed /opt/.fuse.removed /run/fuse-install.lock
    rmdir /opt/fuse 2>/dev/null || :
    exit
fi

if ! is_python_whole; then
    say "installing Python"
    packaged dpkg --configure -a
    packaged apt-get -q update
    packaged apt-get -q install -y --no-install-recommends python3-venv ca-certificates
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed"

key=$(cd "$root" && find pyproject.toml hatch_build.py guest src requirements/run.txt -type f \
    ! -name '*.pyc' ! -name 'fused-*' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-12)
target=/opt/fuse/$key
# What a killed run has left, of whatever version.
for folder in /opt/fuse/*; do
    ! is_ours "${folder##*/}" || [ -e "$folder/whole" ] || rm -rf "$folder"
done
if [ ! -e "$target/whole" ]; then
    say "installing the program in $target"
    umask 022
    mkdir -p /opt/fuse "$target.build"
    trap 'rm -rf "$target.build"' EXIT
    # The sources may be anybody's, and read-only: what is built is a copy.
    (cd "$root" && tar -c --exclude=.git --exclude=.venv --exclude=.cache --exclude='fused-*' .) \
        | tar -x --no-same-owner -C "$target.build"
    quietly python3 -m venv "$target.build/.builder"
    quietly "$target.build/.builder/bin/python" -m pip install -q --require-hashes --only-binary=:all: \
        -r "$root/requirements/build.txt"
    quietly "$target.build/.builder/bin/python" -m pip wheel -q --no-deps --no-build-isolation \
        -w "$target.build/wheel" "$target.build"
    quietly python3 -m venv "$target"
    quietly "$target/bin/python" -m pip install -q --require-hashes --only-binary=:all: -r "$root/requirements/run.txt"
    quietly "$target/bin/python" -m pip install -q --no-deps "$target.build"/wheel/*.whl
    : >"$target/whole"
    rm -rf "$target.build"
    trap - EXIT
fi
exec "$target/bin/fuse" host "$action" "$@"
