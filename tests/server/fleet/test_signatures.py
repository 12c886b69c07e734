import pytest

from steerserve.server.errors import ForwardRefusedError
from steerserve.server.fleet.signatures import CLOCK_SECONDS, Signatures

OLD, NEW = b"o" * 32, b"n" * 32
PATH, KEY = "/v1/generations/cmpl-x", "ab" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_replica_takes_what_another_has_signed_and_proves_itself() -> None:
    here, there = Signatures([NEW], "a:1"), Signatures([NEW], "b:1")
    for key in (KEY, None):
        header = here.sign("PATCH", PATH, key)
        forwarded = there.check(header, "PATCH", PATH)
        assert (forwarded.sender, forwarded.key_sha256) == ("a:1", key)
        assert here.proves(header, forwarded.proof)
        assert not here.proves(here.sign("DELETE", PATH, key), forwarded.proof)
    assert not here.proves(header, None)
    assert not here.proves(header, header[-64:])


@pytest.mark.parametrize(("method", "path"), [("DELETE", PATH), ("PATCH", PATH + "y"), ("POST", "/v1/completions")])
def test_a_signature_is_for_one_request(method: str, path: str) -> None:
    with pytest.raises(ForwardRefusedError, match="not signed"):
        Signatures([NEW], "b:1").check(Signatures([NEW], "a:1").sign("PATCH", PATH, KEY), method, path)


def test_nothing_of_it_can_be_changed() -> None:
    there = Signatures([NEW], "b:1")
    header = Signatures([NEW], "a:1").sign("PATCH", PATH, KEY)
    for changed in (header.replace("ab", "ba", 1), header.replace("a:1", "c:1"), header.replace("t=1", "t=2"), "x", ""):
        with pytest.raises(ForwardRefusedError):
            there.check(changed, "PATCH", PATH)
    with pytest.raises(ForwardRefusedError, match="not signed"):
        Signatures([OLD], "b:1").check(header, "PATCH", PATH)


def test_a_signature_grows_old() -> None:
    clock = Clock()
    header = Signatures([NEW], "a:1", clock).sign("PATCH", PATH, KEY)
    there = Signatures([NEW], "b:1", clock)
    clock.now += CLOCK_SECONDS
    there.check(header, "PATCH", PATH)
    clock.now += 2
    with pytest.raises(ForwardRefusedError, match="clocks differ"):
        there.check(header, "PATCH", PATH)


def test_a_secret_can_be_changed_while_the_fleet_runs() -> None:
    before, between = Signatures([OLD], "a:1"), Signatures([NEW, OLD], "b:1")
    header = before.sign("PATCH", PATH, KEY)
    assert before.proves(header, between.check(header, "PATCH", PATH).proof)
