#!/bin/sh
# Prove deploy/install.sh on a bare Debian with systemd: debootstrap, boot its systemd in namespaces, install, install
# again, a control plane, a command in a machine, uninstall.
#
#   sudo tools/install-check.sh [OPTION...]      options of `fuse host install`; default: --driver qemu
#
# Takes this machine's apt sources, pip configuration and certificates along, and uses its network. Everything else is
# in namespaces and one folder below /var/tmp that is removed at the end. Needs debootstrap; takes minutes.
set -eu

SUITE=${SUITE:-bookworm}
INCLUDE=systemd,systemd-sysv,dbus,git,python3,python3-venv,ca-certificates

case ${1:-} in
--inside) ;;
*)
    [ "$(id -u)" = 0 ] || { echo "install-check: root is needed" >&2; exit 1; }
    group=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)/fuse-install-check
    mkdir "$group"
    trap 'sleep 1; find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true' EXIT
    sh -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$group" unshare --mount --propagation private --cgroup --uts --ipc \
        "$0" --inside "$@"
    exit
    ;;
esac
shift
[ $# -gt 0 ] || set -- --driver qemu

source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
root=$(mktemp -d /var/tmp/fuse-install-check.XXXXXX)
chmod 755 "$root"
mount --bind "$root" "$root"
init=
clean() {
    status=$?
    [ "$status" = 0 ] || echo "== failed with status $status" >&2
    [ -z "$init" ] || kill -9 "$init" 2>/dev/null || true
    umount -R -l "$root" 2>/dev/null || true
    rm -rf --one-file-system "$root"
}
trap clean EXIT
trap 'exit 130' INT TERM
say() { printf '\n== %s\n' "$*"; }
keep() {
    for path in "$@"; do
        [ -e "$path" ] || continue
        mkdir -p "$root${path%/*}"
        rm -rf "${root:?}$path"
        cp -aL "$path" "$root$path"
    done
}

say "debootstrap $SUITE"
debootstrap --variant=minbase --include="$INCLUDE" "$SUITE" "$root" | tail -n 1
keep /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d /etc/apt/auth.conf.d /etc/apt/keyrings
keep /etc/resolv.conf /etc/hosts /etc/pip.conf /root/.config/pip /opt/wheels /usr/local/share/ca-certificates
chroot "$root" update-ca-certificates >/dev/null 2>&1
git clone -q --no-hardlinks "$source" "$root/srv/fuse"
(cd "$source" && git ls-files -z --modified --others --exclude-standard --deduplicate |
    tar -c --null --ignore-failed-read -T - 2>/dev/null) | tar -x -C "$root/srv/fuse" --no-same-owner

say "booting its systemd"
mount -t tmpfs -o mode=755 dev "$root/dev"
for node in null zero full random urandom tty net/tun; do
    mkdir -p "$(dirname "$root/dev/$node")"
    touch "$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for folder in run tmp; do mount -t tmpfs -o mode=755 tmpfs "$root/$folder"; done
chmod 1777 "$root/tmp"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for unit in systemd-networkd systemd-resolved systemd-timesyncd; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
# shellcheck disable=SC2016 # for the inner shell
unshare --mount --pid --fork --kill-child sh -c '
    mount -t proc proc "$1/proc"
    cd "$1" && mkdir -p .before && pivot_root . .before && umount -l /.before && mount --make-rshared /
    exec env -i container=fuse-check PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=journal' \
    sh "$root" &
init=$!
pid=
for _ in $(seq 100); do
    sleep 0.2
    pid=$(cat "/proc/$init/task/$init/children" 2>/dev/null || true)
    [ -n "$pid" ] && [ -S "/proc/${pid% }/root/run/systemd/private" ] && break
done
pid=${pid% }
keep_env=$(env | grep -E '^(PIP_|SSL_|REQUESTS_CA|CURL_CA|[a-z]+_proxy=|[A-Z]+_PROXY=)' | tr '\n' ' ')
# inside COMMAND: as an administrator of that machine.
inside() {
    # shellcheck disable=SC2086 # words on purpose
    nsenter -t "$pid" -m -p -r -w -- env -i HOME=/root PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        $keep_env sh -ec "cd /srv/fuse; $*"
}
inside systemctl is-system-running --wait || true

options=$*
for which in "first time" "second time"; do
    say "deploy/install.sh $options, $which"
    begin=$(date +%s)
    inside "deploy/install.sh $options"
    printf -- '-- %s s\n' "$(($(date +%s) - begin))"
done
say "control plane and a machine"
inside "fuse host install-control --database-url sqlite:///var/lib/fuse-control/fuse.db >/root/fuse.env
set -a; . /root/fuse.env; set +a; fuse run debian-12 -- uname -a"
say "uninstall"
inside "fuse host uninstall"
inside "! ls -d /etc/fuse /var/lib/fuse /opt/fuse /run/fuse /usr/local/bin/fuse 2>/dev/null"
say "passed"
