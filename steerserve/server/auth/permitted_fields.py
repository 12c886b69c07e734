"""Fields of a request that are known not to weaken a mandatory intervention."""

from dataclasses import MISSING, fields
from typing import Final

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.server.errors import PolicyError

JUDGED: Final = frozenset(
    {
        "prompt",
        "suffix",
        "max_tokens",
        "steps",
        "block_length",
        "order",
        "transfer",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "row",
        "priority",
        "stop",
        "ignore_eos",
        "ends_last",
        "logits_eos_inf",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "tell_steps",
        "interventions",
        "trace",
        "abort_when",
        "remask_when",
        "combine",
        "limits",
        "control",
        "measure_kl",
        "verdicts",
        "quality",
    }
)
"""Fields of a row of which it is known that they cannot weaken a mandatory intervention.

Any other is refused to such keys: guidance can drown a push. Limits, joint allocation and controls reach the caller's
own interventions alone, which are marked as such.
"""

JUDGED_OF_PUSHES: Final = frozenset(
    {
        "attribute",
        "feature",
        "vector",
        "strength",
        "op",
        "unit",
        "scope",
        "schedule",
        "layers",
        "direction",
        "when",
        "sha256",
        "negate",
    }
)
"""The same of an intervention's fields: the checks beside a mandatory one know what these do."""


def check_judged(asked: GenerationParams | Intervention, judged: frozenset[str], where: str) -> None:
    """Raise PolicyError for a field that is set and not among `judged`; where: the path of `asked`."""
    for one in fields(asked):
        unset = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name not in judged and getattr(asked, one.name) != unset:
            name = where + one.name
            raise PolicyError(f"{name} may not be set with this key, which carries a mandatory intervention", name)
