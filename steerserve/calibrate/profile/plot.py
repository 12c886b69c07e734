"""A picture of an attribute's profile: when it forms, what pushes do and cost, and what the schedules make of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from schedulers import CommitmentProfile, build_strength, compile_gains
from steerserve.extras import install_command

MISSING = f"no plots: they need matplotlib, {install_command('train')}"


def plot(profile: CommitmentProfile, title: str, path: Path, say: Callable[[str], None]) -> bool:
    """Draw a profile into a PNG file; where matplotlib is not installed, say so, draw nothing and return False."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say(MISSING)
        return False
    # A figure of its own and no pyplot: nothing global is set up or left open.
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    ((curve, gains), (effect, cost)) = figure.subplots(2, 2, sharex=True)
    borders = np.linspace(0, 1, profile.slices + 1)
    curve.plot(borders, profile.curve)
    if profile.standard_error is not None:
        low, high = (np.array(profile.curve) + sign * np.array(profile.standard_error) for sign in (-1, 1))
        curve.fill_between(borders, low, high, alpha=0.25)
    curve.set_title(f"h(p): mean feature activation, {profile.samples} samples")
    for axis, name, values, errors in (
        (effect, "s(p): log-odds per unit strength and slice", profile.sensitivity, profile.sensitivity_error),
        (cost, "c(p): nats a token per squared unit and slice", profile.cost, profile.cost_error),
    ):
        axis.set_title(name)
        if values is None:
            continue
        axis.stairs(values, borders)
        if errors is not None:
            low, high = (np.array(values) + sign * np.array(errors) for sign in (-1, 1))
            axis.fill_between(borders, *(np.append(edge, edge[-1]) for edge in (low, high)), step="post", alpha=0.25)
        axis.axhline(0, color="grey", linewidth=0.5)
    for name in ("uniform", "commitment", "optimal"):
        if name == "optimal" and (profile.sensitivity is None or profile.cost is None):
            continue
        table = compile_gains(*build_strength(name), profile, profile.slices)
        gains.stairs(table.gains.tolist(), borders, label=f"{name} ({table.norm})")
    gains.set_title("gains of schedules")
    gains.legend()
    for axis in (effect, cost):
        axis.set_xlabel("progress")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True
