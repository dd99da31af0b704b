"""Programs, users, networks and the clock of this machine. Pure."""

from typing import Final

from fusevm.host.fitness.facts import Facts
from fusevm.host.fitness.finding import Finding, degraded, ok, unfit
from fusevm.host.fitness.programs import NAMES
from fusevm.host.fitness.rules import find_earlier
from fusevm.host.net.tracking import connections_each, needed_entries
from fusevm.host.vmm.firecracker.versions import judge_versions

_INSTALL: Final = "fuse host install"
_METADATA: Final = "169.254."
#: Where packets of machines are stopped: with a wrong source, to others, to the host.
_GUARDED: Final = ("prerouting", "forward", "input")


def judge_paths(facts: Facts) -> Finding:
    """24. Can nobody but root change what root runs, and what machines are made of?"""
    if not facts.is_root:
        return ok("not needed without root")
    if facts.writable:
        remedy = f"chown root {facts.writable} && chmod go-w {facts.writable}, or use another folder"
        return degraded(f"{facts.writable} can be changed by others than root", remedy)
    return ok("root's alone")


def judge_ids(facts: Facts) -> Finding:
    """25. Does nobody else have the user ids of machines?"""
    end = facts.uid_base + facts.uid_count
    found = f"{facts.uid_base} to {end - 1}"
    taken = sorted({name for name, first, count in facts.ids if first < end and first + count > facts.uid_base})
    if taken and facts.is_root:
        return degraded(f"{found} overlap with {', '.join(taken)}", "give those users other ids (usermod, /etc/subuid)")
    return ok(found if facts.is_root else "not needed without root")


def judge_programs(facts: Facts) -> Finding:
    """26. Is it the tested release, one of the origin's builds, and unchanged since it was installed?"""
    is_needed = facts.driver == "firecracker" or facts.architecture != "x86_64"
    found = [facts.programs[name] for name in NAMES if name in facts.programs]
    missing = [one.path for one in found if not one.is_there]
    if missing or not found:
        if not facts.has_kvm and not is_needed:
            return ok("not installed, and of no use without KVM")
        text = f"{', '.join(missing) or 'nothing'} is not there"
        return unfit(text, _INSTALL) if is_needed else degraded(f"{text}; machines run on QEMU", _INSTALL)
    firecracker, jailer = found
    problem = judge_versions(firecracker.version, jailer.version)
    if problem:
        return unfit(problem, _INSTALL) if is_needed else degraded(problem, _INSTALL)
    changed = [one.path for one in found if one.is_as_installed is False]
    if changed:
        text = f"{', '.join(changed)} has not the digest that was noted when it was installed"
        return unfit(text, _INSTALL) if is_needed else degraded(text, _INSTALL)
    loose = [one.path for one in found if not one.is_static]
    if loose:
        return degraded(f"{', '.join(loose)} is no release build: it may lack its filters of system calls", _INSTALL)
    text = f"Firecracker and jailer {firecracker.version}"
    if firecracker.snapshot_version:
        text += f", snapshot format {firecracker.snapshot_version}"
    is_known = all(one.is_as_installed for one in found)
    return ok(text + (", with the digests of their installation" if is_known else ", installed by others: no digests"))


def judge_network(facts: Facts) -> Finding:
    """28. Can machines have networks?"""
    if not facts.is_root:
        return ok("not needed without root")
    if not facts.has_tun:
        return unfit("/dev/net/tun does not open", "modprobe tun")
    if facts.ruleset is None:
        return unfit("nftables cannot be asked", "apt-get install nftables, and a kernel with CONFIG_NF_TABLES")
    tracked = facts.number("/proc/sys/net/netfilter/nf_conntrack_max")
    needed = needed_entries(facts.machines_at_once)
    # The daemon raises it when it starts, where it can.
    if tracked is not None and tracked < needed and facts.is_serving:
        each = connections_each(tracked, facts.machines_at_once)
        text = f"only {tracked} connections can be followed: each of {facts.machines_at_once} machines gets {each}"
        return degraded(text, f"sysctl net.netfilter.nf_conntrack_max={needed}, and systemctl restart fuse-host")
    forwards = facts.text("/proc/sys/net/ipv4/ip_forward") == "1"
    return ok(f"tun, nftables; packets are {'forwarded' if forwards else 'not forwarded before a machine needs it'}")


def judge_isolation(facts: Facts) -> Finding:
    """29. Are the rules between machines there, and before others?

    They are asked for each machine's own address at its own device, so rp_filter, which asks the routes, adds nothing.
    """
    table = own_table(facts)
    if not facts.is_root or not facts.is_serving:
        return ok("the host daemon makes them when it runs" if facts.is_root else "not needed without root")
    if not all(f"hook {hook}" in table for hook in _GUARDED):
        return degraded("rules of ours are missing, although the daemon runs", "systemctl restart fuse-host")
    name = f"fuse_{facts.instance}"
    earlier = find_earlier(facts.ruleset or "", name, _GUARDED)
    if earlier is not None:
        # It cannot allow what ours refuse: each chain at a hook is asked. It can drop, and change what ours will see.
        text = f"the chain {earlier.name} sees packets at {earlier.hook} ({earlier.priority}) before the table {name}"
        return degraded(
            text, f"give it a higher priority, or see that it lets machines be: nft list chain {earlier.name}"
        )
    return ok(f"the table {name} comes first at forward, input and prerouting; its check of sources replaces rp_filter")


def judge_metadata(facts: Facts) -> Finding:
    """30. Are the metadata service of a cloud and its neighbours out of machines' reach?"""
    if not facts.is_root or not facts.is_serving:
        return ok(
            "the host daemon sees to it when it runs" if facts.is_root else "QEMU's user network keeps them apart"
        )
    if _METADATA not in own_table(facts):
        remedy = "systemctl restart fuse-host"
        return degraded("no rule keeps machines from 169.254.169.254, although the daemon runs", remedy)
    return ok("169.254.0.0/16 is refused")


def own_table(facts: Facts) -> str:
    """What `nft -y list ruleset` shows of the daemon's table; empty without one."""
    lines = (facts.ruleset or "").splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith(f" fuse_{facts.instance} {{")]
    if not starts:
        return ""
    end = next((index for index in range(starts[0], len(lines)) if lines[index] == "}"), len(lines))
    return "\n".join(lines[starts[0] : end])


def judge_clock(facts: Facts) -> Finding:
    """31. Is the clock right? Machines get theirs from here."""
    if facts.is_clock_in_step is None:
        return ok("could not be asked")
    source = "; ptp_kvm is there" if facts.has_ptp_kvm else ""
    if not facts.is_clock_in_step:
        return degraded(f"the kernel's clock is not in step with anything{source}", "apt-get install chrony")
    return ok(f"in step{source}")
