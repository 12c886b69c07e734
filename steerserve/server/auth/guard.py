"""The engine as callers reach it: admission under the policy of the caller's key, and nothing past it."""

from collections.abc import Callable
from typing import Any

from steerserve.engine.api.base import Admitted, Engine
from steerserve.engine.api.events import Event
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import RequestError
from steerserve.server.auth.caller import policy_of_caller
from steerserve.server.auth.policy import Policy
from steerserve.server.telemetry.record import CURRENT_RECORD


class Guard:
    """An `Engine` that admits only what the policy of the request being served allows.

    Every route admits its rows through it, whatever the shape of its body: there is no second place that could forget
    a mandatory intervention, and baselines and controls are rows like any other.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def admit(self, params: GenerationParams) -> Any:
        """Check params against the policy and admit them; also raises PolicyError. The plan marks what the key has
        added as `mandatory`."""
        policy = policy_of_caller()
        guarded = policy.apply(params)
        try:
            admitted: Admitted = self._engine.admit(guarded)
        except RequestError as error:
            raise _explained(error, policy) from error
        policy.check(params, admitted.plan)
        # The receipt of an engine that makes it from the plan is marked by this as well.
        for one in admitted.plan.get("interventions", ())[len(params.interventions) :]:
            one["mandatory"] = True
        CURRENT_RECORD.get().admitted(guarded)
        return admitted

    def add(self, requests: list[Any]) -> None:
        """Queue admitted requests, all of them or none."""
        self._engine.add(requests)

    def abort(self, request_id: str) -> None:
        """Free a request's row before the next step."""
        self._engine.abort(request_id)

    def steer(self, request_id: str, request: Any) -> int | None:
        """Give a request the interventions of `request`, which has come from `admit`."""
        return self._engine.steer(request_id, request)

    def step(self) -> list[Event]:
        """Make one step of the rows that are due."""
        return self._engine.step()

    def close(self) -> None:
        """Release the model."""
        self._engine.close()


def try_mandatory(admit: Callable[[GenerationParams], Any], policy: Policy, max_length: int) -> None:
    """Raise RequestError where a key's mandatory interventions are refused by `admit`, or would not hold."""
    # A prompt is not needed, and half of the longest canvas leaves room for what a model puts before a response.
    params = GenerationParams(max_tokens=min(64, max(1, max_length // 2)), interventions=policy.mandatory)
    admitted: Admitted = admit(params)
    policy.check_mandatory(admitted.plan)


def _explained(error: RequestError, policy: Policy) -> RequestError:
    """A complaint about the number of interventions, with those the caller cannot see counted."""
    if error.param != "interventions" or not policy.mandatory:
        return error
    return type(error)(f"{error} ({len(policy.mandatory)} of them this key's own)", error.param)
