"""Replaying traces: what is counted, for which tier, and how long the first token takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from memos_vllm.bench.simulation import (
    MACHINES,
    POLICIES,
    Machine,
    Outcome,
    Tier,
    Trace,
    Workload,
    create_policy,
    draw,
    replay,
    sweep,
)
from memos_vllm.bench.simulation.policies import Tuning
from memos_vllm.bench.simulation.replay import _waits
from memos_vllm.errors import ConfigurationError

# Ten tokens a second computed, a hundred read, after a hundredth of a second.
TOY = Machine(
    name="toy",
    kv_bytes_per_token=1,
    prefill_tokens_per_second=10.0,
    first_token_seconds=0.5,
    step_tokens=4,
    requests_per_second=1.0,
    origin="a test",
    tiers=(Tier("pool", 4), Tier("disk", 100, 100.0, 0.01)),
)
THIS_MACHINE, H100 = MACHINES["this-machine"], MACHINES["h100"]
CACHING = ["ours", "lru", "arc"]
SMALL = Workload(cubes=400, requests=4000, requests_per_second=3.0, seed=5)


def chats(cubes: list[int], sizes: list[int], plain: list[int] | None = None) -> Trace:
    times = [10.0 * (index + 1) for index in range(len(cubes))]
    return Trace(times, cubes, plain or [0] * len(cubes), sizes)


def without_name(outcome: Outcome) -> Outcome:
    return dataclasses.replace(outcome, policy="")


def test_the_accounts_of_a_trace_worked_by_hand() -> None:
    """Cubes of 2, 3 and 4 tokens in a pool of 4, all of them on a disk."""
    trace = chats([0, 1, 0, 2, 1], [2, 3, 4])
    outcome = replay(trace, TOY, create_policy("lru"), block_tokens=1)
    # Computed, computed, half in the pool and half on the disk, computed, all on the disk.
    pool, disk = outcome.tiers
    assert (pool.hit_rate, disk.hit_rate, outcome.hit_rate) == (0.0, 2 / 5, 2 / 5)
    assert (pool.token_rate, disk.token_rate) == (1 / 14, 4 / 14)
    assert (pool.read_bytes, disk.read_bytes) == (1, 4)
    assert (pool.written_bytes, disk.written_bytes) == (13, 9)
    assert outcome.computed_token_rate == 9 / 14
    assert outcome.prefill_seconds == pytest.approx(1.4)
    assert outcome.prefill_seconds_saved == pytest.approx(0.5)
    assert outcome.load_seconds == pytest.approx(0.02 + 0.04)
    seconds = [0.7, 0.8, 0.52, 0.9, 0.54]
    assert outcome.ttft.mean == pytest.approx(sum(seconds) / 5)
    assert outcome.ttft.p50 == pytest.approx(0.7)
    assert outcome.ttft_queued is not None
    assert outcome.ttft_queued.mean == pytest.approx(outcome.ttft.mean)
    assert outcome.engine_busy == pytest.approx(0.9 / 50)


def test_the_pool_answers_before_the_disk_and_the_disk_is_not_told() -> None:
    """Cube 0 is the disk's oldest though the pool serves it, so cube 2 pushes it out there."""
    machine = TOY.with_size("disk", 4)
    trace = chats([0, 1, 0, 0, 2, 0], [1, 2, 2])
    outcome = replay(trace, machine, create_policy("lru"), block_tokens=1)
    assert outcome.tiers[0].hit_rate == 3 / 6
    assert outcome.tiers[1].hit_rate == 0
    # The last chat finds cube 0 in the pool, and puts it on the disk once more.
    assert outcome.tiers[1].written_bytes == 1 + 2 + 2 + 1


def test_keeping_nothing_saves_nothing() -> None:
    outcome = replay(draw(SMALL), H100, create_policy("nothing"))
    assert (outcome.hit_rate, outcome.prefill_seconds_saved, outcome.load_seconds) == (0, 0, 0)
    assert outcome.computed_token_rate == 1
    assert all(tier.read_bytes == 0 for tier in outcome.tiers)
    assert all(tier.written_bytes == 0 for tier in outcome.tiers[1:])


@pytest.mark.parametrize("tier", ["pool", "nvme"])
def test_with_room_for_everything_all_policies_miss_each_cube_once(tier: str) -> None:
    trace = draw(SMALL)
    machine = H100.with_size("pool", 0).with_size(tier, 10**18)
    machine = dataclasses.replace(machine, tiers=machine.tiers[:2])
    policies = [create_policy(name) for name in CACHING]
    outcomes = list(sweep(trace, machine, policies))
    assert all(without_name(outcome) == without_name(outcomes[0]) for outcome in outcomes)
    first_uses = trace.distinct_cubes / len(trace.times)
    assert outcomes[0].hit_rate == pytest.approx(1 - first_uses, abs=1e-12)
    hits = {use.name: use.hit_rate for use in outcomes[0].tiers}
    assert hits[tier] == pytest.approx(1 - first_uses, abs=1e-12)


@pytest.mark.parametrize("name", CACHING)
def test_without_any_room_every_policy_computes_everything(name: str) -> None:
    machine = THIS_MACHINE.with_size("pool", 0).with_size("disk", 0)
    outcome = replay(draw(SMALL), machine, create_policy(name))
    assert (outcome.hit_rate, outcome.prefill_seconds_saved) == (0, 0)


@pytest.mark.parametrize("tier", ["pool", "nvme"])
def test_lru_never_hits_less_with_a_larger_tier(tier: str) -> None:
    workload = dataclasses.replace(SMALL, drift_seconds=120.0)
    machine = dataclasses.replace(H100.with_size("pool", 10**9), tiers=H100.tiers[:2])
    sizes = {tier: [gigabytes * 10**9 for gigabytes in (2, 5, 10, 20, 60, 200)]}
    outcomes = list(sweep(draw(workload), machine, [create_policy("lru")], sizes=sizes))
    rates = [outcome.hit_rate for outcome in outcomes]
    pools = [outcome.tiers[0].token_rate for outcome in outcomes]
    grows = pools if tier == "pool" else rates
    assert grows == sorted(grows)
    assert grows[0] < grows[-1]


def test_the_preset_of_this_machine_gives_the_first_tokens_that_were_measured_on_it() -> None:
    """README: 1.48 s cold, 0.107 s resident, 0.155 s from the disk, with 3,219 tokens."""

    def p50(policy: str, machine: Machine, cubes: list[int]) -> float:
        trace = chats(cubes, [3219, 8192])
        return replay(trace, machine, create_policy(policy), warm_up=0.7).ttft.p50

    assert p50("nothing", THIS_MACHINE, [0, 0, 0, 0]) == pytest.approx(1.48)
    assert p50("ours", THIS_MACHINE, [0, 0, 0, 0]) == pytest.approx(0.107)
    no_pool = THIS_MACHINE.with_size("pool", 0)
    assert p50("ours", no_pool, [0, 0, 0, 0]) == pytest.approx(0.155, abs=0.005)


def test_our_policy_keeps_more_in_the_pool_than_plain_vllm_beside_plain_traffic() -> None:
    workload = dataclasses.replace(SMALL, cubes=2000, requests=10_000)
    outcomes = {name: replay(draw(workload), H100, create_policy(name)) for name in ("ours", "lru")}
    assert outcomes["ours"].tiers[0].token_rate > 1.2 * outcomes["lru"].tiers[0].token_rate


def test_how_coarse_the_blocks_are_hardly_matters() -> None:
    trace = draw(dataclasses.replace(SMALL, cubes=2000))
    for name in CACHING:
        fine, coarse = (
            replay(trace, H100, create_policy(name), block_tokens=tokens) for tokens in (128, 512)
        )
        for one, other in zip(fine.tiers, coarse.tiers, strict=True):
            assert one.hit_rate == pytest.approx(other.hit_rate, abs=0.003)


def test_a_warm_up_fills_the_tiers_and_is_not_counted() -> None:
    trace = chats([0, 1, 0, 1], [1, 1])
    outcome = replay(trace, TOY, create_policy("lru"), block_tokens=1, warm_up=0.5)
    assert (outcome.requests, outcome.hit_rate) == (2, 1.0)
    assert outcome.engine_busy == 0


def test_slow_tiers_are_left_alone_where_that_is_asked_for() -> None:
    """An H100 computes most memories sooner than object storage delivers them."""
    trace = draw(SMALL)
    machine = H100.with_size("pool", 0).with_size("nvme", 0)
    policy = create_policy("lru")
    loads = replay(trace, machine, policy)
    computes = replay(trace, machine, policy, recompute_when_faster=True)
    assert loads.hit_rate > 0.5
    assert computes.hit_rate == 0
    assert computes.ttft.mean < loads.ttft.mean


def test_waiting_is_for_the_prefills_before_and_loads_hold_up_nobody() -> None:
    times = np.array([10.0, 11.0, 12.0])
    nothing = np.zeros(3)
    # 2 s of prefill from 10 to 12; the next waits one second for it, and computes one more.
    computing = np.array([2.0, 1.0, 0.0])
    assert _waits(times, nothing, nothing, computing).tolist() == [2.0, 2.0, 1.0]
    loading = np.array([5.0, 0.0, 0.0])
    assert _waits(times, nothing, loading, nothing).tolist() == [5.0, 0.0, 0.0]
    # A plain prompt halfway between two chats, at 10.5.
    plain = np.array([0.0, 1.0, 0.0])
    assert _waits(times, plain, nothing, nothing).tolist() == [0.0, 0.5, 0.0]


def test_an_overloaded_engine_has_no_waiting_times() -> None:
    trace = draw(dataclasses.replace(SMALL, requests_per_second=50.0))
    outcome = replay(trace, H100, create_policy("nothing"))
    assert outcome.engine_busy > 1
    assert outcome.ttft_queued is None


def test_a_sweep_is_every_policy_with_every_combination_of_sizes() -> None:
    sizes = {"pool": [10**9, 2 * 10**9], "disk": [3 * 10**9]}
    policies = [create_policy("lru"), create_policy("nothing")]
    shares: list[float] = []
    outcomes = list(
        sweep(
            draw(dataclasses.replace(SMALL, requests=50)),
            THIS_MACHINE,
            policies,
            sizes=sizes,
            on_progress=lambda share, _text: shares.append(share),
        )
    )
    found = [(o.policy, *(tier.capacity_bytes // 10**9 for tier in o.tiers)) for o in outcomes]
    assert found == [("lru", 1, 3), ("nothing", 1, 3), ("lru", 2, 3), ("nothing", 2, 3)]
    assert shares == [0, 0.25, 0.5, 0.75]


def test_every_number_of_a_machine_can_be_replaced() -> None:
    for field in ("kv_bytes_per_token", "prefill_tokens_per_second", "step_tokens"):
        assert getattr(H100.with_setting(field, 77), field) == 77
    changed = H100.with_setting("nvme.read_bytes_per_second", 3e9).with_size("nvme", 5)
    assert changed.tiers[1] == Tier("nvme", 5, 3e9, 0.001)
    assert (changed.tiers[0], changed.tiers[2]) == (H100.tiers[0], H100.tiers[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tape.capacity_bytes", 1),
        ("nvme.colour", 1),
        ("nvme.name", 1),
        ("tiers", 1),
        ("prefill_tokens_per_second", 0),
        ("nvme.capacity_bytes", -1),
        ("step_tokens", float("nan")),
    ],
)
def test_numbers_that_a_machine_does_not_have_or_cannot_have_are_refused(
    name: str, value: float
) -> None:
    with pytest.raises(ConfigurationError):
        H100.with_setting(name, value)


def test_a_policy_or_a_replay_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"there are ours, .*, nothing"):
        create_policy("magic")
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        Tuning(residency_fraction=1.5)
    with pytest.raises(ConfigurationError, match="half-life"):
        Tuning(half_life_seconds=0.0)
    for wrong in ({"block_tokens": 0}, {"warm_up": 1.0}):
        with pytest.raises(ConfigurationError, match="cannot be simulated"):
            replay(draw(SMALL), H100, create_policy("lru"), **wrong)  # type: ignore[arg-type]


_PRINT = """
import json
from memos_vllm.bench.simulation import *
trace = draw(Workload(cubes=300, requests=2000, requests_per_second=3.0, drift_seconds=60.0))
outcomes = sweep(trace, MACHINES["h100"], [create_policy(name) for name in POLICIES])
print(json.dumps([outcome.as_json() for outcome in outcomes]))
"""


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    def run(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", _PRINT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    assert run("1") == run("2")
    assert [outcome["policy"] for outcome in json.loads(run("3"))] == list(POLICIES)


def test_the_simulator_imports_neither_torch_nor_vllm_nor_ray() -> None:
    program = (
        "import sys, memos_vllm.bench.simulation;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'vllm', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


HOUR_OF_FLOODS = Workload(
    cubes=1,
    requests=180,
    requests_per_second=0.05,
    median_tokens=2048,
    spread=0.0,
    # Twice what the pool holds, between any two chats.
    plain_tokens=32_768,
)


def test_through_an_hour_of_floods_the_first_token_stays_where_it_was() -> None:
    machine = THIS_MACHINE.with_size("pool", 16_384 * THIS_MACHINE.kv_bytes_per_token)
    trace = draw(HOUR_OF_FLOODS)
    ours = replay(trace, machine, create_policy("ours"), warm_up=0.02)
    assert ours.tiers[0].hit_rate == 1
    assert ours.ttft_growth == (0, 0)
    assert ours.ttft.p99 == ours.ttft.p50
    plain = replay(trace, machine, create_policy("lru"), warm_up=0.02)
    assert plain.tiers[0].hit_rate < 0.8


def test_a_first_token_that_comes_later_and_later_is_seen() -> None:
    number = 120
    growing = chats(list(range(number)), [10 + index for index in range(number)])
    outcome = replay(growing, TOY, create_policy("nothing"), block_tokens=1)
    assert outcome.ttft_growth is not None
    assert outcome.ttft_growth[0] > 1


def test_a_few_chats_show_no_trend() -> None:
    outcome = replay(chats([0] * 5, [2]), TOY, create_policy("lru"), block_tokens=1)
    assert outcome.ttft_growth is None


def test_more_plain_tokens_than_one_prompt_has_are_several_prompts() -> None:
    """A prompt that fills the whole pool takes every block; what residency keeps outlives two."""
    at_once = chats([0, 0, 0], [2], plain=[0, 8, 8])
    in_parts = dataclasses.replace(at_once, plain_prompt_tokens=4)
    machine = TOY.with_size("pool", 8)
    policy = create_policy("ours", Tuning(residency_fraction=0.5))
    hits = [
        replay(trace, machine, policy, block_tokens=1).tiers[0].hit_rate
        for trace in (at_once, in_parts)
    ]
    assert hits == [0, 2 / 3]
