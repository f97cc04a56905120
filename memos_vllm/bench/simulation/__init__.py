"""A trace simulator for what one machine cannot hold: which hit rate and TTFT to expect of
a given size of each tier, and whether our residency policy is the better one there.

Pure Python on numpy's random numbers: no torch, vLLM or ray, and the same seed gives the
same result.
"""

from memos_vllm.bench.simulation.policies import POLICIES, Policy, create_policy
from memos_vllm.bench.simulation.questions import sweep
from memos_vllm.bench.simulation.replay import Outcome, Quantiles, TierUse, replay
from memos_vllm.bench.simulation.tiers import MACHINES, Machine, Tier
from memos_vllm.bench.simulation.trace import Trace, Workload, draw

__all__ = [
    "MACHINES",
    "POLICIES",
    "Machine",
    "Outcome",
    "Policy",
    "Quantiles",
    "Tier",
    "TierUse",
    "Trace",
    "Workload",
    "create_policy",
    "draw",
    "replay",
    "sweep",
]
