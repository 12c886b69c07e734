"""Number of texts that the figures of a run rest on, counted in its records."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.steering.analysis.frontier import Record
from bench.steering.texts.measure import NEIGHBOURS

GROUPS: Final = {1: "single", 2: "pairs", 3: "triples"}


def count_texts(records: Sequence[Record]) -> dict[str, Any]:
    """Count the texts of the cells but the unsteered one, each number once, rising.

    Returns `texts` by what is steered to, the number of them whose `kl` was measured, and that of `self_bleu`.
    """
    cells = [one for one in records if one["method"] != "none"]
    texts: dict[str, set[int]] = {}
    for one in cells:
        group = "orders" if one["experiment"] == "orders" else GROUPS[len(one["task"].split(" + "))]
        texts.setdefault(group, set()).add(_texts(one))
    return {
        "texts": {group: sorted(texts[group]) for group in (*GROUPS.values(), "orders") if group in texts},
        "kl": sorted({len(one["rows"]["kl"]) for one in cells if "kl" in one["rows"]}),
        "self_bleu": sorted({min(NEIGHBOURS, _texts(one)) for one in cells}),
    }


def counts_line(counts: Mapping[str, Any]) -> str:
    """The same as sentences; nothing where there is no cell."""
    if not counts["texts"]:
        return ""
    groups = ", ".join(f"{group} {_either(several)}" for group, several in counts["texts"].items())
    kl = f"KL is of the first {_either(counts['kl'])} texts of a cell" if counts["kl"] else "KL was not measured"
    return (
        f"Texts a cell: {groups}. {kl}; self-BLEU, which grows with their number, of the first "
        f"{_either(counts['self_bleu'])}."
    )


def _texts(record: Record) -> int:
    return len(record["rows"]["nats"])


def _either(counts: Sequence[int]) -> str:
    *others, last = map(str, counts)
    return f"{', '.join(others)} or {last}" if others else last
