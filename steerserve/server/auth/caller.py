"""Who is calling while a request is served: the policy of the key that it came with."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from steerserve.server.auth.policy import Policy

_POLICY: ContextVar[Policy | None] = ContextVar("policy", default=None)


@contextmanager
def calling(policy: Policy | None) -> Iterator[None]:
    """Let everything inside admit rows under this policy; None: admit nothing."""
    token = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(token)


def policy_of_caller() -> Policy:
    """The policy of the request being served; raises PermissionError where the caller is not known."""
    policy = _POLICY.get()
    if policy is None:
        raise PermissionError("a row was to be admitted for a caller who is not known")
    return policy
