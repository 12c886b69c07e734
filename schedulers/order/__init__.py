"""Orders: which masked position commits next."""

from collections.abc import Mapping
from typing import Final

from schedulers.choice import Choice, build
from schedulers.order.base import Candidates, Order
from schedulers.order.confidence import Confidence
from schedulers.order.entropy import Entropy
from schedulers.order.margin import Margin
from schedulers.order.random import Random
from schedulers.order.sae_attribute import SaeAttribute, uptake
from schedulers.order.sae_stability import SaeStability, feature_stability
from schedulers.order.selection import rank, select

ORDERS: Final[Mapping[str, type[Order]]] = {
    "random": Random,
    "confidence": Confidence,
    "margin": Margin,
    "entropy": Entropy,
    "sae_stability": SaeStability,
    "sae_attribute": SaeAttribute,
}


def build_order(choice: Choice) -> Order:
    """The order that `choice` names; raises ValueError."""
    return build("order", ORDERS, choice)


__all__ = [
    "ORDERS",
    "Candidates",
    "Confidence",
    "Entropy",
    "Margin",
    "Order",
    "Random",
    "SaeAttribute",
    "SaeStability",
    "build_order",
    "feature_stability",
    "rank",
    "select",
    "uptake",
]
