"""Fields of every request body, as the reference has them: type, and whether they must be there. Pure."""

from typing import Any, Final, NamedTuple


class Field(NamedTuple):
    """One field: a type, a set of words, or the fields of an object."""

    kind: "type | tuple[str, ...] | dict[str, Field]"
    is_required: bool = False


_TEXT, _NUMBER, _FLAG = Field(str), Field(int), Field(bool)
_NEEDED_TEXT, _NEEDED_NUMBER, _NEEDED_FLAG = Field(str, True), Field(int, True), Field(bool, True)
_BUCKET = {"size": _NEEDED_NUMBER, "refill_time": _NEEDED_NUMBER, "one_time_burst": _NUMBER}
_LIMITER = {"bandwidth": Field(_BUCKET), "ops": Field(_BUCKET)}
_MACHINE = {
    "vcpu_count": _NEEDED_NUMBER,
    "mem_size_mib": _NEEDED_NUMBER,
    "smt": _FLAG,
    "track_dirty_pages": _FLAG,
    "huge_pages": Field(("None", "2M")),
    "cpu_template": Field(("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")),
}
_DRIVE = {
    "drive_id": _NEEDED_TEXT,
    "is_root_device": _NEEDED_FLAG,
    "path_on_host": _TEXT,
    "socket": _TEXT,
    "is_read_only": _FLAG,
    "partuuid": _TEXT,
    "cache_type": Field(("Unsafe", "Writeback")),
    "io_engine": Field(("Sync", "Async")),
    "rate_limiter": Field(_LIMITER),
}
_NIC = {
    "iface_id": _NEEDED_TEXT,
    "host_dev_name": _NEEDED_TEXT,
    "guest_mac": _TEXT,
    "mtu": _NUMBER,
    "rx_rate_limiter": Field(_LIMITER),
    "tx_rate_limiter": Field(_LIMITER),
}
_LOAD = {
    "snapshot_path": _NEEDED_TEXT,
    "mem_backend": Field({"backend_type": Field(("File", "Uffd"), True), "backend_path": _NEEDED_TEXT}),
    "mem_file_path": _TEXT,
    "enable_diff_snapshots": _FLAG,
    "track_dirty_pages": _FLAG,
    "resume_vm": _FLAG,
    "network_overrides": Field(list),
    "vsock_override": Field({"uds_path": _NEEDED_TEXT}),
    "clock_realtime": _FLAG,
}

#: By method and path; `{id}` stands for the last segment.
BODIES: Final[dict[tuple[str, str], dict[str, Field]]] = {
    ("PUT", "/machine-config"): _MACHINE,
    ("PATCH", "/machine-config"): {name: Field(field.kind) for name, field in _MACHINE.items()},
    ("PUT", "/boot-source"): {"kernel_image_path": _NEEDED_TEXT, "initrd_path": _TEXT, "boot_args": _TEXT},
    ("PUT", "/drives/{id}"): _DRIVE,
    ("PATCH", "/drives/{id}"): {
        "drive_id": _NEEDED_TEXT,
        "path_on_host": _TEXT,
        "rate_limiter": Field(_LIMITER),
    },
    ("PUT", "/network-interfaces/{id}"): _NIC,
    ("PATCH", "/network-interfaces/{id}"): {
        "iface_id": _NEEDED_TEXT,
        "rx_rate_limiter": Field(_LIMITER),
        "tx_rate_limiter": Field(_LIMITER),
    },
    ("PUT", "/vsock"): {"guest_cid": _NEEDED_NUMBER, "uds_path": _NEEDED_TEXT, "vsock_id": _TEXT},
    ("PUT", "/entropy"): {"rate_limiter": Field(_LIMITER)},
    ("PUT", "/serial"): {"serial_out_path": _TEXT, "rate_limiter": Field(_BUCKET)},
    ("PUT", "/logger"): {
        "log_path": _TEXT,
        "level": Field(("Error", "Warning", "Info", "Debug", "Trace", "Off")),
        "show_level": _FLAG,
        "show_log_origin": _FLAG,
        "module": _TEXT,
    },
    ("PUT", "/metrics"): {"metrics_path": _NEEDED_TEXT},
    ("PUT", "/balloon"): {
        "amount_mib": _NEEDED_NUMBER,
        "deflate_on_oom": _NEEDED_FLAG,
        "stats_polling_interval_s": _NUMBER,
        "free_page_reporting": _FLAG,
        "free_page_hinting": _FLAG,
    },
    ("PATCH", "/balloon"): {"amount_mib": _NEEDED_NUMBER},
    ("PUT", "/mmds/config"): {
        "network_interfaces": Field(list, True),
        "version": Field(("V1", "V2")),
        "ipv4_address": _TEXT,
        "imds_compat": _FLAG,
    },
    ("PUT", "/actions"): {"action_type": Field(("FlushMetrics", "InstanceStart", "SendCtrlAltDel"), True)},
    ("PATCH", "/vm"): {"state": Field(("Paused", "Resumed"), True)},
    ("PUT", "/snapshot/create"): {
        "snapshot_type": Field(("Full", "Diff")),
        "snapshot_path": _NEEDED_TEXT,
        "mem_file_path": _NEEDED_TEXT,
    },
    ("PUT", "/snapshot/load"): _LOAD,
}


def find_problem(body: Any, fields: dict[str, Field]) -> str:
    """What is wrong with a body, or ""; in the manner of the words that the reference uses."""
    if not isinstance(body, dict):
        return "invalid type: expected an object"
    for name in body:
        if name not in fields:
            return f"unknown field `{name}`, expected one of {', '.join(f'`{known}`' for known in fields)}"
    for name, field in fields.items():
        if name not in body:
            if field.is_required:
                return f"missing field `{name}`"
            continue
        if problem := _value_problem(name, body[name], field.kind):
            return problem
    return ""


def _value_problem(name: str, value: Any, kind: "type | tuple[str, ...] | dict[str, Field]") -> str:
    if isinstance(kind, dict):
        return find_problem(value, kind) if value is not None else ""
    if isinstance(kind, tuple):
        return "" if value in kind else f"unknown variant `{value}` of `{name}`, expected one of {kind}"
    if value is None and kind is not bool:
        return ""
    # A truth value is an int in Python, but not in JSON.
    is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    is_negative = kind is int and is_right and value < 0
    return "" if is_right and not is_negative else f"invalid type of `{name}`: expected {kind.__name__}"
