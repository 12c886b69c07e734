"""Admission under the policy of the caller's key."""

from typing import Any

from steerserve.engine.api.base import Admitted
from steerserve.engine.api.params import GenerationParams
from steerserve.errors import RequestError
from steerserve.server.auth.caller import policy_of_caller
from steerserve.server.auth.policy import Policy
from steerserve.server.rows.rows import Admit
from steerserve.server.telemetry.record import CURRENT_RECORD


def under_policy(admit: Admit) -> Admit:
    """Bind `Engine.admit` to the policy of the request being served: it then also raises PolicyError.

    Every route admits its rows by this, whatever the shape of its body: there is no second place that could forget a
    mandatory intervention, and baselines and controls are rows like any other.
    """

    def admit_allowed(params: GenerationParams) -> Any:
        policy = policy_of_caller()
        guarded = policy.apply(params)
        try:
            admitted: Admitted = admit(guarded)
        except RequestError as error:
            raise _explained(error, policy) from error
        policy.check(params, admitted.plan)
        # What the key has added. The receipt of an engine that makes it from the plan is marked by this as well.
        for one in admitted.plan.get("interventions", ())[len(params.interventions) :]:
            one["mandatory"] = True
        CURRENT_RECORD.get().admitted(guarded)
        return admitted

    return admit_allowed


def try_mandatory(admit: Admit, policy: Policy, max_length: int) -> None:
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
