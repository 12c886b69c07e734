"""What was measured, as tables, and as curves with fitted exponents."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.engines.measure import rounds_of_16


def exponent(work: Sequence[float], cost: Sequence[float]) -> float:
    """Slope of the least-squares line through log cost over log work."""
    x, y = [math.log(one) for one in work], [math.log(one) for one in cost]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def fitted(shapes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Exponents of seconds a step over batch and length, and of seconds in all over steps."""
    found: dict[str, dict[str, float]] = {}
    for name, figures in shapes.items():
        scaling = figures.get("scaling", {})
        for axis, cost in (("batch", "step_ms"), ("length", "step_ms"), ("steps", "seconds")):
            points = scaling.get(axis, {})
            if len(points) > 1:
                values = [one[cost]["median"] for one in points.values()]
                found.setdefault(name, {})[axis] = exponent([float(n) for n in points], values)
    return found


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Time a token over batch, length and steps, medians with the range, one line a shape, with the exponents of
    `fitted`."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, place in zip(("batch", "length", "steps"), axes, strict=True):
        for name, figures in result["shapes"].items():
            points = figures.get("scaling", {}).get(axis, {})
            if len(points) > 1:
                label = f"{name}: {'time' if axis == 'steps' else 'step'} ~ n^{result['exponents'][name][axis]:.2f}"
                at, rates = [float(n) for n in points], [one["tokens_per_second"] for one in points.values()]
                [line] = place.plot(at, [1e3 / one["median"] for one in rates], "o-", label=label)
                ends = ([1e3 / one[end] for one in rates] for end in ("max", "min"))
                place.vlines(at, *ends, colors=line.get_color())
        place.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms a token")
        place.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def spread_text(figure: Mapping[str, float], digits: int = 2) -> str:
    return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f} to {figure['max']:.{digits}f})"


def tables(result: Mapping[str, Any]) -> str:
    """Markdown of everything."""
    machine = result["machine"]
    lines = ["# The engine against the published loops", ""]
    lines += [f"{machine['cpu']}, {machine['threads']} threads, torch {result['torch']}; `{result['command']}`, "]
    fewer = f" ({rounds_of_16(result['rounds'])} of 16 requests beside the loops)"
    counted = f"{result['rounds']} rounds{fewer if any('loops' in one for one in result['shapes'].values()) else ''}"
    lines += [f"{counted}, {result['seconds']:.0f} s. Medians with the range; ratios are of one round."]
    for name, figures in result["shapes"].items():
        lines += ["", f"## {name}", ""]
        if "loops" in figures:
            lines += ["| work | engine, tokens/s | step, ms | loop, tokens/s | loop / engine | batched loop / engine |"]
            lines[-1] += " identical tokens |"
            lines += ["|---|---|---|---|---|---|---|"]
            for work, one in figures["loops"].items():
                ours, theirs = one["engine"], one["loop"]
                batched = one.get("ratio to batched loop")
                same = one.get("identical_tokens")
                lines += [
                    f"| {work} | {spread_text(ours['tokens_per_second'], 1)} | {spread_text(ours['step_ms'], 1)} | "
                    f"{spread_text(theirs['tokens_per_second'], 1)} | {spread_text(one['ratio to loop'])} | "
                    f"{spread_text(batched) if batched else ''} | {f'{same:.2%}' if same is not None else 'drawn'} |"
                ]
        for title in ("steering", "orders"):
            for what, one in figures.get(title, {}).items():
                if isinstance(one, dict):
                    lines += [
                        "" if what == next(iter(figures[title])) else "",
                        f"{title}, {what}: {spread_text(one, 3)}",
                    ]
        scaling = figures.get("scaling", {})
        if scaling:
            lines += ["", f"Measured matrix products: {scaling['matmul_gflops']:.0f} GFLOP/s.", ""]
            cells = [(axis, n, one) for axis in ("batch", "length", "steps") for n, one in scaling[axis].items()]
            memory = any(one["peak_mib"] is not None for _, _, one in cells)
            lines += [f"| axis | n | step, ms | tokens/s | share of that rate |{' peak MiB |' if memory else ''}"]
            lines += ["|---" * (5 + memory) + "|"]
            for axis, n, one in cells:
                lines += [
                    f"| {axis} | {n} | {spread_text(one['step_ms'], 1)} | {spread_text(one['tokens_per_second'], 1)} | "
                    f"{spread_text(one['share_of_rate'])} |"
                ]
                if memory:
                    lines[-1] += f" {one['peak_mib']:.0f} |" if one["peak_mib"] is not None else " |"
            shown = ", ".join(f"{axis} {value:.2f}" for axis, value in result["exponents"].get(name, {}).items())
            lines += ["", f"Fitted exponents: {shown} (time of a step over batch and length, in all over steps)."]
        if "graphs" in figures:
            lines += ["", "| CUDA graphs | plain / graphs | step plain, ms | with graphs, ms | replayed | identical |"]
            lines += ["|---|---|---|---|---|---|"]
            for work, one in figures["graphs"].items():
                lines += [
                    f"| {work} | {spread_text(one['ratio'])} | {spread_text(one['plain_ms'])} | "
                    f"{spread_text(one['graphs_ms'])} | "
                    f"{one['replayed']:.0%} | {one['identical_tokens']:.2%} |"
                ]
        for what, one in figures.get("phases", {}).items():
            shares = ", ".join(f"{phase} {share:.1%}" for phase, share in one["shares"].items())
            kernels = ", ".join(f"`{kernel}` {share:.1%}" for kernel, share in one["kernels"].items())
            lines += ["", f"Where the time goes, {what}: {shares}. Kernels: {kernels}."]
    return "\n".join(lines) + "\n"
