"""Where the other replicas of a fleet reach this one."""

import ipaddress
import re

from steerserve.errors import SteerserveError

_FORM = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::(\d{1,5}))?")


def netloc_of(address: str, port: int) -> str:
    """An address as it stands in a URL: `host`, `host:port` or a bare IPv6 address, with `port` where it has none.

    Raises SteerserveError.
    """
    found = _FORM.fullmatch(f"[{address}]" if _is_ipv6(address) else address)
    if found is None or int(found[2] or 0) > 65535:
        raise SteerserveError(f"--replica-address must be host or host:port, got {address!r}")
    chosen = int(found[2] or port)
    if chosen == 0:
        raise SteerserveError(f"--replica-address {address} needs a port, since --port 0 is not known beforehand")
    return f"{found[1]}:{chosen}"


def _is_ipv6(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 6
    except ValueError:
        return False
