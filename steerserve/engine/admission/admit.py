"""Admission: check a request whole and resolve every name in it, before anything is queued."""

import uuid
from dataclasses import asdict, replace

from tokenizers import Tokenizer

from schedulers import Order, Transfer, build_order, build_transfer
from steerserve.config import EngineConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.conditions import probes, react
from steerserve.engine.admission.interventions.allocation import allocate
from steerserve.engine.admission.interventions.resolve import feature_readout, overlaps, readout
from steerserve.engine.admission.plan import approximations, most_steps, round_steps
from steerserve.engine.admission.validate import (
    _check_guidance,
    _ids,
    _whole,
    blocks_of,
    check_early_exit,
    check_method,
    check_readings,
    check_refine,
    check_scoring,
    row_cache,
    scored_places,
)
from steerserve.engine.api.params import PRIORITIES, GenerationParams
from steerserve.engine.api.variants import with_order_target
from steerserve.engine.request.intervention import AttributeReadout
from steerserve.engine.request.kv_cache import RowCache
from steerserve.engine.request.refinement import refinement, stretch_of
from steerserve.engine.request.request import Request
from steerserve.errors import RequestError, TooLongError
from steerserve.models.checkpoint.generation_config import check_sampling
from steerserve.saes import SparseAutoencoder

MAX_STOPS = 16
"""Stop strings one request may name."""


def admit(params: GenerationParams, catalogue: Catalogue, tokenizer: Tokenizer, config: EngineConfig) -> Request:
    """The request of checked params; raises RequestError or NotFoundError with field, value and what is allowed."""
    facts, defaults = catalogue.facts, catalogue.defaults
    params = replace(
        params, **{name: value for name, value in asdict(defaults).items() if getattr(params, name) is None}
    )
    order_choice = with_order_target(defaults.order if params.order is None else params.order, params.interventions)
    transfer_choice = defaults.transfer if params.transfer is None else params.transfer
    prompt = tuple(
        ([] if facts.bos_id is None else [facts.bos_id]) + _ids(params.prompt, "prompt", tokenizer, catalogue)
    )
    suffix = tuple(_ids(params.suffix, "suffix", tokenizer, catalogue))
    longest = min(facts.max_length, config.max_canvas)
    _whole("max_tokens", params.max_tokens, 0 if params.prompt_logprobs else 1, max(longest, params.max_tokens))
    total, fits = len(prompt) + params.max_tokens + len(suffix), longest - len(prompt) - len(suffix)
    if total > longest:
        said = (
            f"prompt ({len(prompt)} tokens), max_tokens ({params.max_tokens}) and suffix ({len(suffix)}) make a canvas "
            f"of {total} tokens; at most {longest} are taken"
        )
        if fits < 1:
            raise RequestError(f"{said}, which leaves no room for a response", "prompt")
        raise TooLongError(f"{said}: max_tokens may be {fits}", "max_tokens", fits)
    check_scoring(params, len(prompt) - (facts.bos_id is not None), config.max_steps)
    writes = params.max_tokens > 0
    # What writes nothing is checked as what writes one token.
    params = params if writes else replace(params, max_tokens=1, steps=1, block_length=None)
    block, lead = blocks_of(params, facts, len(prompt), len(suffix))
    blocks = -(-(lead + params.max_tokens) // block)
    # One step a token, or as many as there may be where the response is longer than that.
    whole = params.max_tokens if facts.block is None else blocks * block
    steps = min(whole, config.max_steps // blocks * blocks) if params.steps is None else params.steps
    _whole("steps", steps, 1, config.max_steps)
    if facts.block is not None:
        # How many blocks a text takes depends on its prompt, which who asks need not have counted.
        steps = -(-steps // blocks) * blocks
    if steps % blocks:
        raise RequestError(f"steps must be a multiple of the {blocks} blocks, got {steps}", "steps")
    check_sampling(params.temperature, params.top_p, params.top_k)
    # 0 and -1 are said to have all tokens of a model whose default is fewer.
    params = replace(params, top_k=None if params.top_k in (0, -1) else params.top_k)
    _whole("seed", params.seed, -(2**63), 2**63 - 1)
    _whole("priority", params.priority, *PRIORITIES)
    if len(params.stop) > MAX_STOPS or any(not stop for stop in params.stop):
        raise RequestError(
            f"stop takes up to {MAX_STOPS} strings, none of them empty, got {list(params.stop)!r}", "stop"
        )
    if len(params.interventions) > config.max_interventions:
        raise RequestError(
            f"at most {config.max_interventions} interventions, got {len(params.interventions)}", "interventions"
        )
    try:
        order = build_order(order_choice)
    except ValueError as error:
        raise RequestError(str(error), "order") from error
    try:
        transfer = build_transfer(transfer_choice)
    except ValueError as error:
        raise RequestError(str(error), "transfer") from error
    check_method(facts, order, transfer, blocks)
    if params.ends_last and "probability" not in order.needs:
        raise RequestError("ends_last needs an order by the model's own confidence", "ends_last")
    if not isinstance(params.logits_eos_inf, bool):
        raise RequestError(f"logits_eos_inf must be true or false, got {params.logits_eos_inf!r}", "logits_eos_inf")
    _check_guidance(params, facts, len(prompt) - (facts.bos_id is not None) + len(suffix))
    most = block + transfer.full_steps
    asked_steps, steps = steps, steps if transfer.binds else blocks * min(most, config.max_steps // blocks)
    even = lead == 0 and params.max_tokens % block == 0
    progress = _progress(transfer, block, blocks, steps // blocks) if even else None
    response = (len(prompt), len(prompt) + params.max_tokens)
    rewrites = params.remask_when is not None or params.refine is not None
    allocation = allocate(catalogue, params, response, progress, rewrites=transfer.revises or rewrites)
    interventions = allocation.interventions
    readouts: tuple[AttributeReadout, ...] = ()
    if params.trace is not None:
        _whole("trace.every", params.trace.every, 1, config.max_steps)
        readouts = tuple(
            readout(catalogue, name, f"trace.attributes[{i}]") for i, name in enumerate(params.trace.attributes)
        )
        readouts += tuple(
            feature_readout(catalogue, one, f"trace.features[{i}]") for i, one in enumerate(params.trace.features)
        )
    triggers = react(params, catalogue, steps, config.max_steps)
    remask = None if triggers is None else triggers.remask
    check_refine(params)
    each = 0 if params.refine is None else round_steps(transfer, blocks, block, steps // blocks, stretch_of(params))
    written = most_steps(steps, remask)
    refined = refinement(params, each, written, config.max_steps)
    most = written + (0 if refined is None else refined.steps_left)
    check_readings(params.trace, params.max_tokens, most)
    watched = triggers is not None or any(one.controller is not None for one in interventions)
    held = params.limits is not None or params.measure_kl
    cache = row_cache(params.cache, facts, transfer, params.cfg_scale > 0, params.trace is not None, watched, held)
    judging = probes(params.verdicts, catalogue)
    check_early_exit(params, facts, transfer.revises or rewrites, len(suffix))
    plan = {
        "canvas": {"prompt": len(prompt), "response": params.max_tokens if writes else 0, "suffix": len(suffix)},
        "steps": asked_steps if writes else 0,
        "steps_bind": transfer.binds,
        "max_steps": most if writes else 0,
        "prompt_passes": len(scored_places(prompt, facts)) if params.prompt_logprobs else 0,
        "block_length": block,
        "order": order_choice if isinstance(order_choice, str) else dict(order_choice),
        "transfer": transfer_choice if isinstance(transfer_choice, str) else dict(transfer_choice),
        "revises": transfer.revises or rewrites,
        # Views count blocks from the start of the response.
        "revised_within": params.max_tokens if lead or refined or remask and remask.span != "block" else block,
        "temperature": params.temperature,
        "cfg_scale": params.cfg_scale,
        "approximate": approximations(transfer_choice, steps, cache, params.early_exit),
        "revision": catalogue.revision,
        "interventions": [one.summary for one in interventions],
        "overlaps": overlaps(interventions),
        "verdicts": {name: {"probe_sha256": probe.sha256} for name, probe in judging.items()},
        "refine": None if refined is None else {"rounds": refined.rounds, "span": refined.span, "round_steps": each},
        **allocation.plan,
    }
    request = Request(
        id=uuid.uuid4().hex,
        params=params,
        prompt_ids=prompt,
        suffix_ids=suffix,
        mask_id=facts.mask_id,
        steps=steps,
        block_length=block,
        lead=lead,
        order=order,
        transfer=transfer,
        interventions=interventions,
        readouts=readouts,
        stability=_stability(getattr(order, "sae", None), catalogue) if "stability" in order.needs else None,
        uptake=_read_by(order, catalogue) if "uptake" in order.needs else None,
        plan=plan,
        catalogue=catalogue,
        triggers=triggers,
        refinement=refined,
        budget=allocation.budget,
        cache=cache,
        bare_cache=None if cache is None else RowCache(cache.settings),
        writes=writes,
    )
    plan["reads"] = request.read_of
    plan["rows_per_step"] = request.rows
    return request


def _progress(transfer: Transfer, block: int, blocks: int, steps: int) -> list[float] | None:
    """Progress before each step at which something commits, where it depends on neither draws nor the model."""
    masked = transfer.masked(block, steps)
    if masked is None:
        return None
    masked = sorted(set(masked), reverse=True)
    return [(i * block + block - left) / (block * blocks) for i in range(blocks) for left in masked]


def _stability(name: str | None, catalogue: Catalogue) -> SparseAutoencoder:
    """The SAE whose features an order compares between steps: the one named, else the deepest for masked ones."""
    if name is not None:
        return catalogue.sae(name, "order")
    usable = [sae for sae in catalogue.saes.values() if sae.facts.policy != "visible"]
    if not usable:
        raise RequestError("order 'sae_stability' needs an SAE for masked positions, and none is loaded", "order")
    return max(usable, key=lambda sae: sae.facts.layer)


def _read_by(order: Order, catalogue: Catalogue) -> AttributeReadout:
    """The attribute an order reads, which it names once `with_target` has found one."""
    name: str | None = getattr(order, "attribute", None)
    if name is None:
        raise RequestError(
            "order 'sae_attribute' needs an attribute to read: name one in the order, or push one", "order"
        )
    return readout(catalogue, name, "order.attribute")
