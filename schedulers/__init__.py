"""Strength schedules, orders and transfers: how hard to steer at a step, and which positions commit at it.

Imports torch and the standard library only, so that it serves a notebook or another engine as well.
"""

from schedulers.choice import Choice
from schedulers.joint_profile import JointProfile
from schedulers.order import ORDERS, Candidates, Order, Random, build_order, feature_stability, rank, select, uptake
from schedulers.profile import CommitmentProfile, rho
from schedulers.strength import (
    CONTROLLERS,
    NORMS,
    SCHEDULES,
    STRENGTHS,
    Controllers,
    ControllerState,
    Feedback,
    GainTable,
    JointTable,
    StrengthSchedule,
    build_controller,
    build_strength,
    check_target,
    compile_gains,
    compile_joint,
    controllers,
    joint_gains,
    joint_rho,
    joint_weights,
    slice_of,
)
from schedulers.transfer import TRANSFERS, Quota, Transfer, build_transfer

__all__ = [
    "CONTROLLERS",
    "Candidates",
    "Choice",
    "CommitmentProfile",
    "ControllerState",
    "Controllers",
    "Feedback",
    "GainTable",
    "JointProfile",
    "JointTable",
    "NORMS",
    "ORDERS",
    "Order",
    "Quota",
    "Random",
    "SCHEDULES",
    "STRENGTHS",
    "StrengthSchedule",
    "TRANSFERS",
    "Transfer",
    "build_controller",
    "build_order",
    "build_strength",
    "build_transfer",
    "check_target",
    "compile_gains",
    "compile_joint",
    "controllers",
    "feature_stability",
    "joint_gains",
    "joint_rho",
    "joint_weights",
    "rank",
    "rho",
    "select",
    "slice_of",
    "uptake",
]
