"""The longest life that an environment may ask for, where the settings name one."""

import pytest

from fusevm.core.policy import Policy
from fusevm.core.spec import complete
from fusevm.model.errors import BadField

LIMITED = Policy(longest_runtime_seconds=9000, allow_unlimited_runtime=False)


def test_up_to_the_longest_runtime_everything_may_be_asked_for() -> None:
    assert complete(LIMITED, max_runtime_seconds=9000).max_runtime_seconds == 9000
    assert complete(LIMITED).max_runtime_seconds == LIMITED.default_max_runtime_seconds
    assert complete(Policy(), max_runtime_seconds=9001).max_runtime_seconds == 9001


@pytest.mark.parametrize("asked", [9001, -1, "unlimited"])
def test_a_longer_runtime_is_refused_with_the_longest(asked: int | str) -> None:
    with pytest.raises(BadField, match="9000") as caught:
        complete(LIMITED, max_runtime_seconds=asked)
    assert caught.value.field == "spec.max_runtime_seconds"
