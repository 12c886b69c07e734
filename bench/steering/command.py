"""The command line of the instrument."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.judges.scoring import load_judge
from bench.steering.plan.cells import EXPERIMENTS, Cell, plan
from bench.steering.plan.methods import CANDIDATES, METHODS
from bench.steering.plan.settings import (
    FULL,
    QUICK,
    SITE_PROFILES,
    SITE_PROFILES_QUICK,
    SITES,
    SITES_QUICK,
    Settings,
    with_texts,
)
from bench.steering.plan.sites import SITE_EXPERIMENTS, SITE_METHODS, one_site_attributes, prepare, stated
from bench.steering.plan.targets import Target
from bench.steering.records import RECORDS, Store, origin_of, still_refused, write_header
from bench.steering.report.render import render
from bench.steering.run import run
from bench.steering.texts.classifiers import train_classifiers
from bench.steering.texts.measure import Judges
from bench.steering.texts.real import real_texts
from steerserve.config import EngineConfig
from steerserve.errors import SteerserveError
from steerserve.memory import keep_freed_memory
from steerserve.runtime.load import BUNDLED, load_runtime

ROWS = 64
"""Rows of one forward pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the last line printed is JSON."""
    given = _parser().parse_args(arguments)
    keep_freed_memory()
    full, quick = (FULL, QUICK) if given.sites is None else (SITES, SITES_QUICK)
    settings = quick if given.quick else full
    settings = with_texts(settings, given.texts) if given.texts else settings
    name = ("steer" if given.sites is None else "steer-sites") + ("-quick" if given.quick else "")
    out: Path = given.out or Path(__file__).parents[1] / "results" / name
    try:
        if not given.render and not _measure(given, settings, out):
            return 0
        summary = render(out)
    except SteerserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((out / "tables.md").read_text(encoding="utf-8"))
    print(json.dumps(headline(summary)))
    return 0


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """One line of figures: the share of each method at a loss ratio of at most 1.10."""
    return {
        group: {method: round(one["share"], 3) for method, one in bounds["1.10"].items()}
        for group, bounds in summary["equal_quality"].items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/steer.py", description="Measure steering: schedules, directions, sets and orders."
    )
    parser.add_argument("--data", type=Path, required=False, help="folder of labelled texts that was calibrated on")
    parser.add_argument("--judge", type=Path, required=False, help="folder that bench/judge.py wrote")
    for name in ("model", "sae", "attributes"):
        parser.add_argument(f"--{name}", type=Path, help=f"folder of the {name}; default: the bundled one")
    parser.add_argument("--quick", action="store_true", help="few texts and strengths: minutes instead of an hour")
    parser.add_argument("--only", choices=EXPERIMENTS, action="append", help="one experiment; may be repeated")
    parser.add_argument(
        "--sites",
        type=Path,
        metavar="DIR",
        help="instead: each attribute at one layer at a time, predicted against measured gain; the attributes of "
        "single layers are made and measured in this folder",
    )
    parser.add_argument("--attribute", help="with --sites: of this attribute only")
    parser.add_argument("--texts", type=int, help="texts of a cell; the other counts in proportion")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/steer[-quick]")
    parser.add_argument("--keep-texts", type=Path, help="file that the texts themselves are appended to")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--plan", action="store_true", help="only say how much there is to do")
    parser.add_argument("--render", action="store_true", help="only make tables and figures of what is there")
    return parser


def _measure(given: argparse.Namespace, settings: Settings, out: Path) -> bool:
    """Measure what is not there yet; False where only the plan was asked for."""
    for name in ("data", "judge"):
        if getattr(given, name) is None:
            raise SteerserveError(f"--{name} is needed to measure anything; --render draws what is there")
    if given.sites is not None and given.only:
        raise SteerserveError("--sites is an experiment of its own: leave out --only")
    if given.sites is None and given.attribute is not None:
        raise SteerserveError("--attribute must be given with --sites only")
    quality = load_judge(given.judge)
    if given.sites is not None and not _prepare_sites(given, settings):
        return False
    most = max(settings.texts, settings.ranked_texts * CANDIDATES)
    config = EngineConfig(max_rows=ROWS, max_queue=max(256, most), threads=given.threads)
    folders = None if given.attributes is None else [given.attributes]
    engine = load_runtime(given.model, given.sae, folders, config).engine
    attributes = engine.catalogue.attributes
    every, methods = (EXPERIMENTS, tuple(METHODS)) if given.sites is None else (SITE_EXPERIMENTS, SITE_METHODS)
    cells = plan(settings, attributes, given.only or every, methods)
    _say(cells)
    if given.plan:
        return False
    classifiers = train_classifiers(given.data, attributes, settings.classifier_texts, settings.seed)
    judges = Judges(quality, classifiers)
    origin = origin_of(engine, judges, settings)
    store = Store(out / RECORDS)
    refused = run(engine, cells, judges, store, origin, settings, given.data, given.keep_texts)
    # What other weights, attributes or settings left behind is dropped, but not what this call was not asked for.
    whole = plan(settings, attributes, every, methods)
    store.keep([cell.key(origin) for cell in whole])
    targets = [Target(one) for one in sorted({cell.attributes for cell in cells if cell.experiment == "sets"})]
    real = real_texts(given.data, attributes, targets, judges, settings.seed) if targets else {}
    write_header(out, engine, judges, settings, origin, still_refused(out, refused, cells), real)
    return True


def _prepare_sites(given: argparse.Namespace, settings: Settings) -> bool:
    """Make and measure the attributes of single sites, and go on with these; False where the plan was asked for."""
    for name, flag in (("model", "model"), ("saes", "sae"), ("attributes", "attributes")):
        setattr(given, flag, getattr(given, flag) or BUNDLED / name)
    alone = one_site_attributes(given.model, given.attributes, given.attribute)
    profiles = SITE_PROFILES_QUICK if given.quick else SITE_PROFILES
    print(stated(profiles, len(alone)), file=sys.stderr)
    if given.plan:
        _say(plan(settings, alone, SITE_EXPERIMENTS, SITE_METHODS))
        return False
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    prepare(given.model, alone, given.data, given.sites, profiles)
    given.attributes = given.sites
    return True


def _say(cells: Sequence[Cell]) -> None:
    texts = sum(cell.texts for cell in cells)
    passes = sum((cell.texts * cell.candidates + cell.kl_texts) * int(cell.request["steps"]) for cell in cells)
    print(f"{len(cells)} cells, {texts} texts, about {passes} forward passes of one row", file=sys.stderr)
