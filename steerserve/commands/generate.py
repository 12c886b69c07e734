"""`steerserve generate`: one generation, shown live as the canvas denoises."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from steerserve.commands.command import CommandParser, add_artifacts, add_command, check_files, check_folders
from steerserve.commands.flags import FlagGroup, names_in
from steerserve.errors import RequestError
from steerserve.steering.names import SCOPE_NAMES

if TYPE_CHECKING:
    from steerserve.engine.api.events import Result
    from steerserve.engine.api.params import GenerationParams, Intervention
    from steerserve.server.protocol.receipts import Form

MODEL = FlagGroup("steerserve.config", "ModelConfig")
SAES = FlagGroup("steerserve.config", "SaeConfig")
ENGINE = FlagGroup(
    "steerserve.config",
    "EngineConfig",
    skip=("max_rows", "max_batch_tokens", "max_queue", "max_steps", "max_interventions"),
)
GENERATION = FlagGroup(
    "steerserve.engine.api.params",
    "GenerationParams",
    skip=(
        "prompt",
        "row",
        "priority",
        "logprobs",
        "top_logprobs",
        "tell_steps",
        "interventions",
        "trace",
        "limits",
        "abort_when",
        "remask_when",
        "refine",
    ),
    helps={
        "suffix": "text after the response: the response is written between prompt and suffix",
        "order": "which masked position commits next: "
        f"{names_in('schedulers.order', 'ORDERS')} (which reads what is pushed), or a JSON object with its options",
        "transfer": "how many positions commit at a step: "
        f"{names_in('schedulers.transfer', 'TRANSFERS')}, or a JSON object with its options",
        "temperature": "0 takes the likeliest token",
        "top_p": "sample from the likeliest tokens that hold this much probability",
        "seed": "two runs with one seed draw the same numbers, steered or not",
        "stop": "cut the text before this; may be repeated",
    },
)
STEERING = FlagGroup(
    "steerserve.engine.api.params",
    "Intervention",
    skip=("attribute", "feature", "vector", "strength", "scope", "when", "sha256", "negate", "mandatory"),
    helps={
        "op": "what a push does to the hidden state",
        "unit": "unit of the strengths; the attribute's own where left out",
        "schedule": "how hard to push when: "
        f"{names_in('schedulers.strength', 'STRENGTHS')}, {names_in('schedulers.strength', 'CONTROLLERS')}, "
        "or a JSON object with its options",
        "layers": "layers to push at; the attribute's own where left out",
    },
)


def add_to(commands: "argparse._SubParsersAction[CommandParser]") -> None:
    """Add the command."""
    add_command(
        commands,
        "generate",
        add_flags,
        "Generate one text and watch it form. In a terminal the canvas is redrawn at every denoising step, masks as "
        "▯ and new tokens highlighted; elsewhere only the final text is written.",
        """
        steerserve generate "The" --attribute topic/sports=0.4 --schedule commitment --steps 32 --baseline
        steerserve generate "The" --steer "topic/sports@0.3:commitment - sentiment/positive"
        steerserve generate "The" --feature layer-4-mask:812=1.0 --unit max_act --json
        """,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="text to go on from (default: none)")
    parser.add_argument("--baseline", action="store_true", help="also run unsteered with the same noise, side by side")
    parser.add_argument("--json", action="store_true", help="write text, tokens and receipt as one JSON object")
    parser.add_argument(
        "--receipt",
        choices=("short", "full"),
        default="short",
        help="how much of the receipt --json tells (default: short)",
    )
    GENERATION.add_to(parser, "diffusion")
    group = parser.add_argument_group("what to steer by (each may be repeated)")
    group.add_argument(
        "--attribute",
        type=attribute_push,
        action="append",
        default=[],
        metavar="NAME[=STRENGTH]",
        help="push towards an attribute, at its own strength unless one is given",
    )
    group.add_argument(
        "--feature",
        type=feature_push,
        action="append",
        default=[],
        metavar="SAE:INDEX=STRENGTH",
        help="push one feature of an SAE",
    )
    group.add_argument(
        "--vector",
        type=vector_push,
        action="append",
        default=[],
        metavar="NAME=STRENGTH",
        help="push along a vector loaded with --vectors",
    )
    group.add_argument(
        "--steer",
        metavar="TEXT",
        help='the whole steering as text, such as "topic/sports@0.3:commitment - sentiment/negative"; not with the '
        "other flags of steering",
    )
    group.add_argument(
        "--refine",
        type=int,
        metavar="ROUNDS",
        help="write stretches of the finished text anew, and keep what the probes of --verdicts, or of what is pushed, "
        "like better",
    )
    how = STEERING.add_to(parser, "how to steer (for every push)")
    how.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="push no further than this from the unsteered text: measured nats a token, at the cost of a second row",
    )
    how.add_argument("--scope", choices=SCOPE_NAMES, help="positions to push at; the attribute's own where left out")
    add_artifacts(parser)
    MODEL.add_to(parser, "model")
    SAES.add_to(parser, "SAEs")
    ENGINE.add_to(parser, "engine")


def attribute_push(text: str) -> dict[str, Any]:
    """Read NAME or NAME=STRENGTH into fields of an Intervention."""
    name, given, strength = text.partition("=")
    return {"attribute": name, "strength": _strength(strength, text) if given else None}


def feature_push(text: str) -> dict[str, Any]:
    """Read SAE:INDEX=STRENGTH into fields of an Intervention."""
    feature, _, strength = text.rpartition("=")
    sae, _, index = feature.rpartition(":")
    if not sae or not index.isdecimal():
        raise argparse.ArgumentTypeError(f"expected SAE:INDEX=STRENGTH such as layer-4-mask:812=1.0, got {text!r}")
    return {"feature": (sae, int(index)), "strength": _strength(strength, text)}


def vector_push(text: str) -> dict[str, Any]:
    """Read NAME=STRENGTH into fields of an Intervention."""
    name, _, strength = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"expected NAME=STRENGTH such as happy=0.8, got {text!r}")
    return {"vector": name, "strength": _strength(strength, text)}


def _strength(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the strength in {whole!r} is not a number: {text!r}") from error


def interventions(arguments: argparse.Namespace) -> "tuple[Intervention, ...]":
    """The pushes that the command line asks for, attributes first; raises RequestError for what `--steer` does not
    read, or does not go with."""
    from steerserve.engine.api.params import FeatureRef, Intervention, VectorRef

    if arguments.steer is not None:
        return _interventions_of(arguments)
    how = STEERING.given(arguments) | ({"scope": arguments.scope} if arguments.scope else {})
    attributes = [Intervention(**push, **how) for push in arguments.attribute]
    features = [
        Intervention(feature=FeatureRef(*push["feature"]), strength=push["strength"], **how)
        for push in arguments.feature
    ]
    vectors = [
        Intervention(vector=VectorRef(name=push["vector"]), strength=push["strength"], **how)
        for push in arguments.vector
    ]
    return (*attributes, *features, *vectors)


def _interventions_of(arguments: argparse.Namespace) -> "tuple[Intervention, ...]":
    from steerserve.server.protocol.steering import Change
    from steerserve.server.rows.interventions import pushes

    others = {"attribute": arguments.attribute, "feature": arguments.feature, "vector": arguments.vector}
    others |= STEERING.given(arguments) | {"scope": arguments.scope}
    beside = next((name for name, value in others.items() if value), None)
    if beside is not None:
        raise RequestError(f"--steer says all of the steering: leave --{beside} out, or write it into the text")
    try:
        return tuple(one for one, _ in pushes(Change.of_text(arguments.steer)))
    except ValueError as error:
        raise RequestError(f"--steer {arguments.steer!r}: {error}") from error


def refining(params: "GenerationParams", rounds: int) -> "GenerationParams":
    """The row with a refinement, judged by the attributes that are pushed where no verdicts are asked for: those that
    are pushed against are wanted absent.

    Raises RequestError where there is none to judge by, or one is pushed both ways.
    """
    from steerserve.engine.api.params import Refine
    from steerserve.server.rows.criteria import unwanted

    pushed: dict[str, set[bool]] = {}
    for one in params.interventions:
        if one.attribute is not None:
            pushed.setdefault(one.attribute, set()).add(unwanted(one))
    judging = params.verdicts or tuple(pushed)
    if not judging:
        raise RequestError(
            "--refine keeps what probes like better: push an attribute with --attribute, or name some with --verdicts"
        )
    torn = [name for name in judging if len(pushed.get(name, ())) > 1]
    if torn:
        raise RequestError(
            f"--refine: {torn[0]!r} is pushed both ways, so whether texts should have it is not known: judge by "
            "others, with --verdicts"
        )
    absent = tuple(name for name in judging if pushed.get(name) == {True})
    return replace(params, refine=Refine(rounds, absent=absent), verdicts=judging)


def run(arguments: argparse.Namespace) -> int:
    """Generate, showing every step where standard output is a terminal."""
    from steerserve.engine.api.params import Limits

    check_folders(arguments, "model", "sae", "attributes")
    params: GenerationParams = GENERATION.build(
        arguments, prompt=arguments.prompt, interventions=interventions(arguments)
    )
    if arguments.max_kl is not None:
        params = replace(params, limits=Limits(max_kl=arguments.max_kl))
    if arguments.refine is not None:
        params = refining(params, arguments.refine)
    engine_config, model_config = ENGINE.build(arguments), MODEL.build(arguments)
    check_files(arguments, tokenizer=model_config.tokenizer)

    from rich.console import Console

    from steerserve.commands.terminal import run_requests
    from steerserve.engine.api.variants import baseline_of
    from steerserve.runtime.load import load_runtime

    say = partial(Console(stderr=True, highlight=False, soft_wrap=True).print, markup=False)
    folders = (arguments.model, arguments.sae, arguments.attributes)
    runs = {"steered" if params.interventions else "generated": params}
    if arguments.baseline:
        runs["baseline"] = baseline_of(params)

    def check(admit: "Callable[[GenerationParams], Any]", max_length: int) -> None:  # noqa: ARG001
        for one in runs.values():
            admit(one)

    runtime = load_runtime(
        *folders, engine_config, model_config, say, SAES.build(arguments), arguments.vectors, check=check
    )
    console = Console(highlight=False)
    try:
        results = run_requests(runtime.engine, runtime.decode, runs, None if arguments.json else console)
    finally:
        runtime.engine.close()
    if arguments.json:
        sys.stdout.write(json.dumps(report(results, arguments.receipt), ensure_ascii=False, indent=2) + "\n")
    elif not console.is_terminal:
        lines = [result.text if len(results) == 1 else f"{name}: {result.text}" for name, result in results.items()]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def report(results: "dict[str, Result]", form: "Form") -> dict[str, Any]:
    """The first result as JSON, the baseline beside it where there is one."""
    from steerserve.server.protocol.receipts import in_form

    choices = {
        name: asdict(one) | {"receipt": one.receipt and in_form(one.receipt, form)} for name, one in results.items()
    }
    first, *_ = choices.values()
    return first | ({"baseline": choices["baseline"]} if "baseline" in choices else {})
