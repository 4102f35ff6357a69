"""What recomputing whole stages changes in a plan. Seconds and bytes."""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from partitioners.plan.plan import Plan


def price_stages(plan: Plan, stages: Collection[int]) -> Plan:
    """The plan's figures when ``stages`` keep only what they receive."""
    received = [sum(b.bytes for b in plan.boundaries if b.target == stage) for stage in range(plan.num_stages)]
    return replace(plan, stages=tuple(
        replace(cost, backward=cost.backward + cost.forward, activation_bytes=float(received[stage]),
                workspace_bytes=cost.workspace_bytes + cost.activation_bytes,
                first_workspace_bytes=cost.first_workspace_bytes + cost.activation_bytes) if stage in stages else cost
        for stage, cost in enumerate(plan.stages)))
