"""Defaults, bounds and spellings of what a create asks for."""

import pytest
from making import POLICY, ready, running
from msgspec.structs import replace

from fusevm.core.spec import MAX_SECONDS, complete, resources_of
from fusevm.model.environment import Spec
from fusevm.model.errors import BadField, SnapshotNotReady
from fusevm.model.host import Resources
from fusevm.model.network import Network
from fusevm.model.snapshot import SnapshotState

DEFAULT = Spec(cpus=1, ram_mb=512, storage_gb=4, image="debian-12", max_runtime_seconds=7200, idle_timeout_seconds=0)


def problem(**asked: object) -> BadField:
    with pytest.raises(BadField) as caught:
        complete(POLICY, **asked)  # type: ignore[arg-type]
    return caught.value


def test_nothing_asked_means_all_defaults():
    assert complete(POLICY) == DEFAULT


def test_zero_and_empty_mean_unset():
    asked = {
        "cpus": 0,
        "ram_mb": 0,
        "storage_gb": 0,
        "region": "",
        "image": "",
        "arch": "",
        "host_id": "",
        "labels": {},
        "max_runtime_seconds": 0,
        "idle_timeout_seconds": 0,
    }
    assert complete(POLICY, **asked) == DEFAULT  # type: ignore[arg-type]
    assert complete(POLICY, max_runtime_seconds="") == DEFAULT


def test_what_is_asked_within_bounds_is_kept():
    spec = complete(
        POLICY,
        cpus=32,
        ram_mb=128,
        storage_gb=1,
        region="eu",
        image="alpine",
        arch="arm64",
        host_id="h1",
        labels={"gpu": "no", "a.b_c-d": "1"},
        max_runtime_seconds=1,
        idle_timeout_seconds=60,
        network=Network(internet=False),
    )
    assert spec == Spec(
        cpus=32,
        ram_mb=128,
        storage_gb=1,
        image="alpine",
        region="eu",
        arch="arm64",
        labels={"gpu": "no", "a.b_c-d": "1"},
        host_id="h1",
        max_runtime_seconds=1,
        idle_timeout_seconds=60,
        network=Network(internet=False),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_runtime_seconds", 315_360_000),
        ("idle_timeout_seconds", 315_360_000),
        ("ram_mb", 1 << 24),
        ("storage_gb", 1 << 20),
        ("image", "x" * 512),
        ("labels", {f"k{n}": "v" for n in range(64)}),
        ("labels", {"k" * 63: "v" * 63}),
    ],
)
def test_the_bounds_themselves_are_allowed(field: str, value: object):
    assert getattr(complete(POLICY, **{field: value}), field) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpus", -1),
        ("cpus", 33),
        ("ram_mb", -1),
        ("ram_mb", 127),
        ("ram_mb", 1 << 40),
        ("storage_gb", -5),
        ("storage_gb", 1 << 40),
        ("max_runtime_seconds", -2),
        ("max_runtime_seconds", MAX_SECONDS + 1),
        ("max_runtime_seconds", "10"),
        ("max_runtime_seconds", "for ever"),
        ("idle_timeout_seconds", -1),
        ("idle_timeout_seconds", 59),
        ("arch", "sparc"),
        ("region", "a\nb"),
        ("image", "x" * 513),
        ("host_id", "\0"),
        ("labels", {"": "x"}),
        ("labels", {"a": ""}),
        ("labels", {"a b": "x"}),
        ("labels", {"a": "x" * 64}),
        ("labels", {"-a": "x"}),
        ("labels", {"a": "x."}),
        ("labels", {f"k{n}": "v" for n in range(65)}),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_the_name_of_its_field(field: str, value: object):
    error = problem(**{field: value})
    assert error.field == f"spec.{field}"
    assert error.message.startswith(f"spec.{field}: ")
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("asked", "kept"), [("amd64", "amd64"), ("x86_64", "amd64"), ("X86_64", "amd64"), ("aarch64", "arm64")]
)
def test_the_spellings_of_an_architecture_are_one(asked: str, kept: str):
    assert complete(POLICY, arch=asked).arch == kept


@pytest.mark.parametrize("asked", [-1, "unlimited"])
def test_unlimited_runtime_is_given_only_where_the_policy_allows_it(asked: int | str):
    assert complete(POLICY, max_runtime_seconds=asked).max_runtime_seconds == -1
    strict = replace(POLICY, allow_unlimited_runtime=False)
    with pytest.raises(BadField, match=r"spec\.max_runtime_seconds: this server allows no unlimited runtime"):
        complete(strict, max_runtime_seconds=asked)


def test_a_default_of_the_operator_is_not_held_against_the_user():
    generous = replace(POLICY, default_max_runtime_seconds=-1, default_idle_timeout_seconds=30, default_cpus=64)
    spec = complete(generous)
    assert (spec.max_runtime_seconds, spec.idle_timeout_seconds, spec.cpus) == (-1, 30, 64)


def test_labels_are_copied():
    labels = {"a": "1"}
    spec = complete(POLICY, labels=labels)
    labels["a"] = "2"
    assert spec.labels == {"a": "1"}


def test_a_machine_counts_as_one():
    wanted = Resources(cpus=2, ram_mb=1024, storage_gb=8, vm_count=1)
    assert resources_of(complete(POLICY, cpus=2, ram_mb=1024, storage_gb=8)) == wanted


# -- seed, queue and ports -----------------------------------------------------------------------------------------

SEED = ready(running(image="alpine"), arch="arm64")


def test_a_snapshot_brings_its_image_and_architecture_along():
    spec = complete(POLICY, seed=SEED)
    assert (spec.seed_snapshot_id, spec.image, spec.arch) == ("snap-0u1", "alpine", "arm64")
    assert complete(POLICY, seed=SEED, arch="aarch64") == spec
    old = replace(SEED, image="", arch="")
    assert (complete(POLICY, seed=old).image, complete(POLICY, seed=old, arch="amd64").arch) == ("debian-12", "amd64")


def test_a_snapshot_and_an_image_exclude_each_other():
    refusal = problem(seed=SEED, image="alpine")
    assert refusal.field == "spec.image"
    assert "either seed_snapshot_id or an image" in refusal.problem


def test_a_snapshot_of_another_architecture_is_refused():
    assert problem(seed=SEED, arch="amd64").field == "spec.arch"


@pytest.mark.parametrize("state", [state for state in SnapshotState if state is not SnapshotState.READY])
def test_only_a_ready_snapshot_can_be_started_from(state: SnapshotState):
    with pytest.raises(SnapshotNotReady):
        complete(POLICY, seed=replace(SEED, state=state))


def test_how_long_to_wait_is_bounded():
    assert complete(POLICY).queue_seconds == complete(POLICY, queue_seconds=0).queue_seconds == 0
    most = POLICY.max_queue_seconds
    assert complete(POLICY, queue_seconds=most).queue_seconds == most
    for asked in (-1, most + 1):
        assert problem(queue_seconds=asked).field == "spec.queue_seconds"
