"""What is said to the API, in which order: against the fake's own list of fields, and against the API's description."""

import os
from pathlib import Path

import msgspec
import pytest
import yaml

from fusevm.host.vmm.driver import BootPlan, Nic, Rate
from fusevm.host.vmm.firecracker.calls import MAX_BOOT_ARGS, Call, plan_boot, render_boot_args
from fusevm.host.vmm.firecracker.driver import check_plan
from fusevm.host.vmm.firecracker.jail import Inside
from fusevm.model.errors import BootFailed
from fusevm.testing.fake_firecracker.rules import Rules
from fusevm.testing.fake_firecracker.schema import BODIES, find_problem

INSIDE = Inside()
#: Firecracker's own description of its API; not part of the project.
DESCRIPTION = Path(
    os.environ.get("FUSE_FIRECRACKER_API", Path(__file__).parents[6] / "shared/firecracker/firecracker-v1.16.1.yaml")
)
change = msgspec.structs.replace


def bodies(plan: BootPlan) -> list[tuple[Call, dict]]:
    return [(call, msgspec.json.decode(msgspec.json.encode(call.body))) for call in plan_boot(plan, INSIDE)]


def said(plan: BootPlan, path: str) -> dict:
    return next(body for call, body in bodies(plan) if call.path == path)


# -- order and content -------------------------------------------------------------------------------------------------


def test_the_order_of_a_boot(whole_plan):
    assert [f"{call.method} {call.path}" for call in plan_boot(whole_plan, INSIDE)] == [
        "PUT /logger",
        "PUT /metrics",
        "PUT /serial",
        "PUT /machine-config",
        "PUT /boot-source",
        "PUT /drives/image",
        "PUT /drives/overlay",
        "PUT /network-interfaces/net0",
        "PUT /mmds/config",
        "PUT /vsock",
        "PUT /entropy",
        "PUT /balloon",
        "PUT /actions",
    ]


def test_a_machine_without_disks_and_network_has_no_calls_for_them(whole_plan):
    bare = change(whole_plan, image=None, overlay=None, nic=None)
    paths = [call.path for call in plan_boot(bare, INSIDE)]
    assert not [path for path in paths if path.startswith(("/drives", "/network", "/mmds"))]
    assert paths[-1] == "/actions"


def test_everything_is_carried_out_by_the_reference_rules(whole_plan):
    rules = Rules(whole_plan.machine_id)
    for call in plan_boot(whole_plan, INSIDE):
        answer = rules.answer(call.method, call.path, msgspec.json.encode(call.body))
        assert answer.status == 204, (call, answer)
    assert rules.state == "Running"


def test_no_disk_is_the_root_device_beside_an_initramfs(whole_plan):
    assert [body["is_root_device"] for call, body in bodies(whole_plan) if "drives" in call.path] == [False, False]
    assert said(whole_plan, "/boot-source")["initrd_path"] == INSIDE.initramfs


def test_the_image_is_read_only_and_what_the_guest_has_synced_of_the_overlay_is_kept(whole_plan):
    assert said(whole_plan, "/drives/image")["is_read_only"]
    overlay = said(whole_plan, "/drives/overlay")
    assert "is_read_only" not in overlay
    assert overlay["cache_type"] == "Writeback"


def test_ids_of_devices_can_be_part_of_a_path(whole_plan):
    names = [call.path.split("/")[2] for call in plan_boot(whole_plan, INSIDE) if call.path.count("/") == 2]
    assert {"image", "overlay", "net0"} <= set(names)
    assert all(name.replace("_", "").isalnum() for name in names if name != "config")


def test_the_balloon_gives_way_before_the_guest_runs_out_of_memory(whole_plan):
    balloon = said(whole_plan, "/balloon")
    assert balloon["deflate_on_oom"]
    assert balloon["amount_mib"] == 0


def test_the_metadata_service_speaks_only_to_who_asked_for_a_token(whole_plan):
    assert said(whole_plan, "/mmds/config") == {"network_interfaces": ["net0"], "version": "V2"}


def test_console_and_entropy_are_limited_in_the_vmm(whole_plan):
    assert said(whole_plan, "/serial")["rate_limiter"] == {
        "size": 65_536,
        "refill_time": 1000,
        "one_time_burst": 1 << 20,
    }
    assert said(whole_plan, "/entropy") == {"rate_limiter": {"bandwidth": {"size": 65_536, "refill_time": 1000}}}


def test_disks_are_limited_as_planned(whole_plan):
    assert "rate_limiter" not in said(whole_plan, "/drives/overlay")
    plan = change(whole_plan, disk_rate=Rate(bytes_per_s=50_000_000))
    for disk in ("image", "overlay"):
        assert said(plan, f"/drives/{disk}")["rate_limiter"] == {"bandwidth": {"size": 50_000_000, "refill_time": 1000}}
    plan = change(whole_plan, disk_rate=Rate(bytes_per_s=1, ops_per_s=300))
    assert said(plan, "/drives/image")["rate_limiter"]["ops"] == {"size": 300, "refill_time": 1000}


def test_kernel_parameters(whole_plan):
    words = render_boot_args(whole_plan).split()
    assert words[-1] == "fuse.nonce=abc"
    assert "reboot=k" in words  # the only end that a guest can bring about on x86
    assert "panic=-1" in words
    assert "nomodule" not in words  # distributions' kernels have their drivers in modules


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"command_line": "x" * MAX_BOOT_ARGS}, "longer than 2048 bytes"),
        ({"overlay_format": "qcow2"}, "reads only raw"),
        ({"nic": Nic(user_network="restrict=on")}, "is no tap"),
    ],
)
def test_what_firecracker_cannot_have_is_refused_before_anything_is_made(whole_plan, changes, problem):
    check_plan(whole_plan)
    with pytest.raises(BootFailed, match=problem):
        check_plan(change(whole_plan, **changes))


# -- against descriptions of the API -----------------------------------------------------------------------------------


class Description:
    """Firecracker's own description (Swagger 2): what a body must look like."""

    def __init__(self, path: Path) -> None:
        self._document = yaml.safe_load(path.read_text())

    def body(self, method: str, path: str) -> dict | None:
        """The schema of a request's body; None for a request that there is not."""
        operation = self._document["paths"].get(path, {}).get(method.lower())
        parameters = operation["parameters"] if operation else []
        return next((self.resolve(one["schema"]) for one in parameters if one["in"] == "body"), None)

    def resolve(self, schema: dict) -> dict:
        reference = schema.get("$ref")
        return self._document["definitions"][reference.rpartition("/")[2]] if reference else schema

    def problem(self, value: object, schema: dict) -> str:
        """What is wrong with a value, or ""."""
        schema = self.resolve(schema)
        kinds = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict}
        kind = kinds[schema.get("type", "object")]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"{value!r} is no {kind.__name__}"
        if "enum" in schema and value not in schema["enum"]:
            return f"{value!r} is none of {schema['enum']}"
        if kind is int and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            return f"{value} is out of bounds"
        return self._object_problem(value, schema) if isinstance(value, dict) else ""

    def _object_problem(self, value: dict, schema: dict) -> str:
        known = schema.get("properties", {})
        if unknown := set(value) - set(known):
            return f"unknown fields {unknown}"
        if missing := set(schema.get("required", ())) - set(value):
            return f"missing fields {missing}"
        return next((said for name in value if (said := self.problem(value[name], known[name]))), "")


def described() -> list[Description]:
    """The description, where it is present."""
    return [Description(path) for path in [DESCRIPTION] if path.exists()]


def pattern_of(call: Call) -> str:
    words = call.path.split("/")
    ids = {"drives": "{drive_id}", "network-interfaces": "{iface_id}"}
    return f"/{words[1]}/{ids[words[1]]}" if len(words) == 3 and words[1] in ids else call.path


def test_every_body_is_as_the_fake_and_the_description_have_it(whole_plan):
    plan = change(whole_plan, disk_rate=Rate(bytes_per_s=1, ops_per_s=1))
    for call, body in bodies(plan):
        fields = BODIES[call.method, pattern_of(call).replace("drive_id", "id").replace("iface_id", "id")]
        assert find_problem(body, fields) == "", call
        for description in described():
            schema = description.body(call.method, pattern_of(call))
            assert schema is not None, call
            assert description.problem(body, schema) == "", call


def test_the_fake_knows_no_field_that_the_description_does_not():
    assert all(isinstance(fields, dict) and fields for fields in BODIES.values())
    ids = {"/drives/{id}": "/drives/{drive_id}", "/network-interfaces/{id}": "/network-interfaces/{iface_id}"}
    for (method, path), fields in BODIES.items():
        for description in described():
            schema = description.body(method, ids.get(path, path))
            assert schema is not None, path
            assert set(fields) <= set(schema["properties"]), path
            # A change need not name everything, whatever its description says.
            required = set(schema.get("required", ())) if method == "PUT" else set()
            assert {name for name, field in fields.items() if field.is_required} >= required, path
