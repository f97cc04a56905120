"""What hit rate and TTFT to expect with X GB of each tier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from memos_vllm.bench.simulation.policies import Policy
from memos_vllm.bench.simulation.replay import BLOCK_TOKENS, Outcome, replay
from memos_vllm.bench.simulation.tiers import Machine
from memos_vllm.bench.simulation.trace import Trace


def sweep(
    trace: Trace,
    machine: Machine,
    policies: Sequence[Policy],
    *,
    sizes: Mapping[str, Sequence[int]] | None = None,
    block_tokens: int = BLOCK_TOKENS,
    warm_up: float = 0.0,
    recompute_when_faster: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> Iterator[Outcome]:
    """Every policy with every combination of tier sizes, on the same trace.

    Args:
        sizes: tier -> bytes to try; the machine's own size for tiers that are not named.
        on_progress: told the share done of all, and what is being replayed.
    Raises:
        ConfigurationError: a tier that the machine does not have.
    """
    machines = list(_machines(machine, sizes or {}))
    runs = list(itertools.product(machines, policies))
    for index, (sized, policy) in enumerate(runs):

        def report(share: float, index: int = index, name: str = policy.name) -> None:
            if on_progress is not None:
                on_progress((index + share) / len(runs), f"{name}, {index + 1} of {len(runs)}")

        yield replay(
            trace,
            sized,
            policy,
            block_tokens=block_tokens,
            warm_up=warm_up,
            recompute_when_faster=recompute_when_faster,
            on_progress=report,
        )


def _machines(machine: Machine, sizes: Mapping[str, Sequence[int]]) -> Iterator[Machine]:
    for combination in itertools.product(*sizes.values()):
        sized = machine
        for tier, size in zip(sizes, combination, strict=True):
            sized = sized.with_size(tier, size)
        yield sized
