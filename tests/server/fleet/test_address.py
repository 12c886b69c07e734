import pytest

from steerserve.errors import SteerserveError
from steerserve.server.fleet.address import netloc_of


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("10.1.2.3", "10.1.2.3:8000"),
        ("10.1.2.3:90", "10.1.2.3:90"),
        ("fd00::12", "[fd00::12]:8000"),
        ("[fd00::12]:90", "[fd00::12]:90"),
        ("replica-1.peers.svc", "replica-1.peers.svc:8000"),
    ],
)
def test_an_address_as_it_stands_in_a_url(given: str, wanted: str) -> None:
    assert netloc_of(given, 8000) == wanted


@pytest.mark.parametrize("given", ["", "http://a", "a b", "user@host", "a:b", "a:70000", "a,b", "[fd00"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(SteerserveError, match="must be host or host:port"):
        netloc_of(given, 8000)


def test_a_port_must_be_known() -> None:
    with pytest.raises(SteerserveError, match="needs a port"):
        netloc_of("host", 0)
    assert netloc_of("host:1", 0) == "host:1"
