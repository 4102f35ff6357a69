"""What a partition is, and a second opinion on it that shares no arithmetic with the solvers."""

from partitioners.plan.plan import Boundary, Plan, Setting, StageCost, Tie, deal, gap_above
from partitioners.plan.recomputing import price_stages
from partitioners.plan.verification import check_rules, verify

__all__ = ["Boundary", "Plan", "Setting", "StageCost", "Tie", "check_rules", "deal", "gap_above", "price_stages",
           "verify"]
