"""Targets of steering: single attributes, pairs and triples, chosen by a rule and not by how they come out."""

from collections.abc import Iterable
from dataclasses import dataclass

FIRST_KINDS = ("topic", "sentiment")


@dataclass(frozen=True)
class Target:
    """Attributes that a text is to have, all of them."""

    attributes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of one attribute; the names of several, joined."""
        return " + ".join(self.attributes)


def kind(attribute: str) -> str:
    """What the attributes of one classifier have in common: `topic` of `topic/sports`."""
    return attribute.split("/")[0]


def singles(names: Iterable[str]) -> list[Target]:
    """Each attribute."""
    return [Target((name,)) for name in sorted(names)]


def pairs(names: Iterable[str], most: int) -> list[Target]:
    """The i-th attribute of the first kind with the (i + 1)-th of the second, names in order and taking turns."""
    kinds = _by_kind(names)
    if len(kinds) < 2:
        return []
    first, second = kinds[:2]
    return [Target((one, second[(i + 1) % len(second)])) for i, one in enumerate(first)][:most]


def triples(names: Iterable[str], most: int) -> list[Target]:
    """The i-th attribute of the first kind with the i-th of the second and the i-th of all other kinds together."""
    kinds = _by_kind(names)
    if len(kinds) < 3:
        return []
    first, second, rest = kinds[0], kinds[1], [name for one in kinds[2:] for name in one]
    return [Target((one, second[i % len(second)], rest[i % len(rest)])) for i, one in enumerate(first)][:most]


def _by_kind(names: Iterable[str]) -> list[list[str]]:
    """Names in order by kind: topic and sentiment first, then the others by name."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(kind(name), []).append(name)
    order = sorted(found, key=lambda one: (FIRST_KINDS.index(one) if one in FIRST_KINDS else len(FIRST_KINDS), one))
    return [found[one] for one in order]
