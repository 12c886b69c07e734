"""When to steer how hard, and which position commits next: strength schedules, orders and transfers.

Imports torch and the standard library only, so that it serves a notebook or another engine as well.
"""

from schedulers.choice import Choice
from schedulers.order import ORDERS, Candidates, Order, build_order, feature_stability, rank, select
from schedulers.profile import CommitmentProfile, rho
from schedulers.strength import NORMS, STRENGTHS, GainTable, StrengthSchedule, build_strength, compile_gains, slice_of
from schedulers.transfer import TRANSFERS, Quota, Transfer, build_transfer

__all__ = [
    "NORMS",
    "ORDERS",
    "STRENGTHS",
    "TRANSFERS",
    "Candidates",
    "Choice",
    "CommitmentProfile",
    "GainTable",
    "Order",
    "Quota",
    "StrengthSchedule",
    "Transfer",
    "build_order",
    "build_strength",
    "build_transfer",
    "compile_gains",
    "feature_stability",
    "rank",
    "rho",
    "select",
    "slice_of",
]
