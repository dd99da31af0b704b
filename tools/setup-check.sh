#!/bin/sh
# Prove the first command of the README in a bare Debian root with only git, make and python3: twice, from a fresh clone.
#
#   sudo tools/setup-check.sh [COMMAND...]      default: make quickstart
#
# Takes this machine's apt sources, pip configuration and certificates along. Everything happens in a private mount
# and process namespace and in one folder below /var/tmp, which is removed at the end; the network is this machine's.
# Needs debootstrap.
set -eu

SUITE=${SUITE:-bookworm}
INCLUDE=git,make,python3,ca-certificates

if [ "${1:-}" != --inside ]; then
    [ "$(id -u)" = 0 ] || { echo "setup-check: root is needed" >&2; exit 1; }
    exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$0" --inside "$@"
fi
shift

source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
root=$(mktemp -d /var/tmp/fuse-setup-check.XXXXXX)
chmod 755 "$root"
# ip(8) changes how / is mounted: it must be a mount.
mount --bind "$root" "$root"
clean() {
    status=$?
    [ "$status" = 0 ] || echo "== failed with status $status" >&2
    umount -R -l "$root" 2>/dev/null || true
    rm -rf --one-file-system "$root"
}
trap clean EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }
timed() {
    begin=$(date +%s)
    "$@"
    printf -- '-- %s s: %s\n' "$(($(date +%s) - begin))" "$*"
}

# keep PATH...: copy files of this machine to the same place in the root.
keep() {
    for path in "$@"; do
        [ -e "$path" ] || continue
        mkdir -p "$root${path%/*}"
        rm -rf "${root:?}$path"
        cp -aL "$path" "$root$path"
    done
}

say "debootstrap $SUITE"
timed debootstrap --variant=minbase --include="$INCLUDE" "$SUITE" "$root" | tail -n 2
[ -x "$root/usr/bin/make" ] || { echo "debootstrap failed" >&2; exit 1; }
keep /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d /etc/apt/auth.conf.d /etc/apt/keyrings
keep /etc/resolv.conf /etc/hosts /etc/pip.conf /root/.config/pip /opt/wheels
keep /usr/local/share/ca-certificates
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
chroot "$root" update-ca-certificates >/dev/null 2>&1

# What is committed, and over it what is not yet.
git clone -q --no-hardlinks "$source" "$root/work"
(cd "$source" && git ls-files -z --modified --others --exclude-standard --deduplicate | tar -c --null --ignore-failed-read \
    -T - 2>/dev/null) | tar -x -C "$root/work" --no-same-owner

# inside COMMAND...: run in the root, with this machine's pip, proxy and certificate variables only.
inside() {
    keep_env=$(env | grep -E '^(PIP_|SSL_|REQUESTS_CA|CURL_CA|[a-z]+_proxy=|[A-Z]+_PROXY=)' | tr '\n' ' ')
    # shellcheck disable=SC2086 # words on purpose
    chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 $keep_env \
        sh -c "cd /work && $*"
}

say "without root: what is missing must be named, with the command, and a status other than 0"
if inside setpriv --reuid 65534 --regid 65534 --clear-groups make quickstart; then
    echo "it should have failed" >&2
    exit 1
fi
[ $# -gt 0 ] || set -- make quickstart
for which in "first time" "second time"; do
    say "$*, $which"
    timed inside "$*"
done
say "passed"
