"""The machines that a trace is replayed on: how fast they compute, and their tiers.

Each constant says where it is from: measured here, a vendor's figure, or an assumption. Each
can be replaced, by `with_size` and `with_setting`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from memos_vllm.errors import ConfigurationError

GIB = 1 << 30
POOL = "pool"


@dataclass(frozen=True, slots=True)
class Tier:
    """One place where KV lies.

    Attributes:
        read_bytes_per_second: into the pool, checksums included; None for the pool itself.
        latency_seconds: from asking for an artifact to its first byte, and what else a read
            costs whatever its size.
    """

    name: str
    capacity_bytes: int
    read_bytes_per_second: float | None = None
    latency_seconds: float = 0.0

    def read_seconds(self, num_bytes: float) -> float:
        if self.read_bytes_per_second is None:
            return 0.0
        return self.latency_seconds + num_bytes / self.read_bytes_per_second


@dataclass(frozen=True, slots=True)
class Machine:
    """A server: one model on one engine, with its tiers from the fastest.

    Attributes:
        prefill_tokens_per_second: of one request; taken to be the same at every length.
        first_token_seconds: TTFT of a chat whose memory is wholly in the pool.
        step_tokens: most tokens of the pool that one engine step can allocate; it is what
            residency keeps clear before its blocks.
        requests_per_second: of a workload that does not say.
        origin: where the numbers are from, in a sentence for people.
        tiers: the KV pool first, and it has no read speed; then those of whole artifacts.
    """

    name: str
    kv_bytes_per_token: int
    prefill_tokens_per_second: float
    first_token_seconds: float
    step_tokens: int
    requests_per_second: float
    origin: str
    tiers: tuple[Tier, ...]

    @property
    def pool(self) -> Tier:
        return self.tiers[0]

    @property
    def stores(self) -> tuple[Tier, ...]:
        return self.tiers[1:]

    def prefill_seconds(self, tokens: float) -> float:
        return tokens / self.prefill_tokens_per_second

    def with_size(self, tier: str, capacity_bytes: int) -> Machine:
        """The same machine with another size of one tier.

        Raises:
            ConfigurationError: it has no tier of this name, or the size is below 0.
        """
        return self.with_setting(f"{tier}.capacity_bytes", capacity_bytes)

    def with_setting(self, name: str, value: float) -> Machine:
        """The same machine with another number for a field, or for `TIER.FIELD`.

        Raises:
            ConfigurationError: it has no such number, or the value cannot be.
        """
        owner, _, field = name.rpartition(".")
        if not owner:
            return dataclasses.replace(self, **_checked(self, name, field, value))
        if owner not in (tier.name for tier in self.tiers):
            names = ", ".join(tier.name for tier in self.tiers)
            raise ConfigurationError(f"{self.name} has no tier '{owner}'; it has {names}")
        tiers = tuple(
            dataclasses.replace(tier, **_checked(tier, name, field, value))
            if tier.name == owner
            else tier
            for tier in self.tiers
        )
        return dataclasses.replace(self, tiers=tiers)


def _checked(target: Machine | Tier, name: str, field: str, value: float) -> dict[str, Any]:
    """The field with its value, an int where the field is one."""
    old = getattr(target, field) if field in (f.name for f in dataclasses.fields(target)) else None
    if not isinstance(old, (int, float)):
        raise ConfigurationError(f"there is no number '{name}' to set")
    may_be_zero = field in ("capacity_bytes", "latency_seconds")
    if not (value >= 0 if may_be_zero else value > 0):
        raise ConfigurationError(
            f"{name} is {value:g}; it must {'not be below' if may_be_zero else 'be above'} 0"
        )
    return {field: int(value) if isinstance(old, int) else float(value)}


THIS_MACHINE = Machine(
    name="this-machine",
    # SmolLM2-135M in bfloat16: 30 layers x keys and values x 3 KV heads x 64 x 2 bytes.
    kv_bytes_per_token=30 * 2 * 3 * 64 * 2,
    # Measured here (2 Xeon cores, vLLM 0.32, README): a cold prompt with 3,219 tokens of memory
    # answers in 1.48 s, a warm one in 0.107 s.
    prefill_tokens_per_second=3219 / (1.48 - 0.107),
    # Measured here: a resident cube, equal to vLLM's warm prefix cache.
    first_token_seconds=0.107,
    # vLLM 0.32's defaults for a CPU: 2,048 tokens a step, and one new block of 128 tokens for
    # each of at most 128 requests.
    step_tokens=2048 + 128 * 128,
    # Assumption: less than half of the engine's time even with every memory computed.
    requests_per_second=0.2,
    origin="speeds measured with SmolLM2-135M on 2 Xeon cores; sizes as served there",
    tiers=(
        # What the benchmarks serve with (VLLM_CPU_KVCACHE_SPACE=1).
        Tier(POOL, 1 * GIB),
        # Measured here: an import runs at 2.0 to 2.3 GB/s inside the engine (3.3 alone), from
        # files in the page cache. The first chat after kill -9 takes 46 ms longer than a
        # resident one, and 37 of them are 3,219 tokens at 2.0 GB/s. The size is the default
        # of `artifact_budget_gib`.
        Tier("disk", 20 * GIB, 2.0e9, 0.009),
    ),
)

H100 = Machine(
    name="h100",
    # Llama-3.1-8B in bfloat16: 32 layers x keys and values x 8 KV heads x 128 x 2 bytes.
    kv_bytes_per_token=32 * 2 * 8 * 128 * 2,
    # Assumption: half of the vendor's 989 TFLOP/s (H100 SXM, dense bfloat16), at 2 FLOP for
    # each of 8.03e9 parameters and token. Attention's own FLOP are left out, so that long
    # memories are computed slower than this says.
    prefill_tokens_per_second=0.5 * 989e12 / (2 * 8.03e9),
    # Assumption: tokenizing, scheduling and one step; nothing of ours was run on an H100.
    first_token_seconds=0.025,
    # vLLM 0.32's defaults for a server on an H100: 8,192 tokens a step, and one new block of
    # 16 tokens for each of at most 1,024 requests.
    step_tokens=8192 + 1024 * 16,
    # Assumption: about half of the engine's time with every memory computed.
    requests_per_second=3.0,
    origin="Llama-3.1-8B on vendors' figures and assumptions, not measured",
    tiers=(
        # Assumption: 80 GB (the vendor's) x 0.9, less 16 GB of weights and 4 GB of activations.
        Tier(POOL, 52 * 10**9),
        # Vendor's figure for a PCIe 4.0 x4 data-centre drive: 7 GB/s of sequential reads. Size
        # and latency are assumptions; through host memory, without GPUDirect.
        Tier("nvme", 3_840 * 10**9, 7.0e9, 0.001),
        # Vendor's figures for Amazon S3: 100 to 200 ms to the first byte of a small object, 85
        # to 90 MB/s a connection. Assumption: 16 ranges at a time, with a network that bears it.
        Tier("object", 100 * 10**12, 16 * 85e6, 0.150),
    ),
)

MACHINES = {machine.name: machine for machine in (THIS_MACHINE, H100)}
