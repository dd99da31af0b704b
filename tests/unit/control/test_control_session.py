"""Session cookies and API keys, without HTTP."""

import pytest

from fusevm.control.keys import MAX_TEXT, digest_of, make_text, prefix_of
from fusevm.control.secrets import Sealer
from fusevm.control.session import LIFE_S, Sessions, render_cookie
from fusevm.model.errors import NoEncryptionKey

KEY, OTHER = bytes(range(32)), bytes(32)


class Clock:
    """A clock by hand."""

    at_ms = 1_000_000

    def now_ms(self) -> int:
        return self.at_ms

    async def sleep_until(self, at_ms: int) -> None:
        raise NotImplementedError


def _sessions(key: bytes = KEY, token: str = "master", clock: Clock | None = None) -> Sessions:
    return Sessions(Sealer(key), clock or Clock(), token)


def test_a_session_opens_on_another_replica_and_says_whose_it_is() -> None:
    value = _sessions().begin("ak_1", "abc")
    session = _sessions().open(value)
    assert session is not None
    assert (session.key_id, session.prefix) == ("ak_1", "abc")
    assert _sessions().open(_sessions().begin()) is not None


def test_a_session_ends_after_its_time() -> None:
    clock = Clock()
    value = _sessions(clock=clock).begin()
    clock.at_ms += LIFE_S * 1000 - 1
    assert _sessions(clock=clock).open(value) is not None
    clock.at_ms += 1
    assert _sessions(clock=clock).open(value) is None


def test_a_session_ends_with_the_master_token_and_with_the_encryption_key() -> None:
    value = _sessions().begin()
    assert _sessions(token="another").open(value) is None
    assert _sessions(key=OTHER).open(value) is None
    rotated = Sessions(Sealer(OTHER, [KEY]), Clock(), "master")
    assert rotated.open(value) is not None


@pytest.mark.parametrize("value", ["", "x", "!", "ä", "AAAA", "A" * 5000, "master"])
def test_what_was_made_up_opens_nothing(value: str) -> None:
    assert _sessions().open(value) is None


def test_no_bit_of_a_session_can_be_changed() -> None:
    value = _sessions().begin()
    for place in range(0, len(value), 7):
        other = "A" if value[place] != "A" else "B"
        assert _sessions().open(value[:place] + other + value[place + 1 :]) is None


def test_another_sealed_value_is_no_session() -> None:
    sealed = Sealer(KEY).seal('{"expires_at_ms": 99999999999, "bound_to": ""}', row="host:a/token")
    assert _sessions().open(sealed) is None


def test_without_a_key_no_session_begins() -> None:
    with pytest.raises(NoEncryptionKey):
        Sessions(Sealer(None), Clock(), "master").begin()


def test_the_cookie_is_for_this_server_only() -> None:
    assert render_cookie("v", is_secure=True) == (
        "fuse_session=v; Path=/; Max-Age=604800; HttpOnly; SameSite=Lax; Secure"
    )
    assert render_cookie("", is_secure=False) == "fuse_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"


def test_a_keys_text_tells_its_prefix() -> None:
    prefix, text = make_text()
    assert prefix_of(text) == prefix
    assert make_text()[1] != text
    assert digest_of(text) != digest_of(text + "x")


@pytest.mark.parametrize("text", ["", "fuse_sk_", "fuse_sk_abc", "fuse_sk_abc_", "fuse_sk__x", "sk_abc_x", "abc_x"])
def test_what_is_no_key_has_no_prefix(text: str) -> None:
    assert prefix_of(text) == ""


def test_an_endless_key_is_not_looked_up() -> None:
    assert prefix_of("fuse_sk_a_" + "x" * MAX_TEXT) == ""
