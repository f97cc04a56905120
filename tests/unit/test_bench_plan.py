"""What a run of the benchmark would do, and when a sample does not show what its row claims."""

from __future__ import annotations

import pytest

from memos_vllm.bench.flood import Pool, concurrency_of
from memos_vllm.bench.plan import MIN_ROUNDS, make_plan
from memos_vllm.bench.record import Cell
from memos_vllm.bench.situations import BY_NAME, SITUATIONS, Server, fault_of
from memos_vllm.errors import ConfigurationError

MODEL = {"max_model_len": 8192, "block_tokens": 128}


def test_the_full_grid_has_every_situation_and_goes_as_far_as_the_model_allows() -> None:
    plan = make_plan(quick=False, **MODEL)
    assert plan.memory_tokens == (512, 1024, 2048, 3072, 6144)
    assert {cell.query_tokens for cell in plan.cells} == {32, 256, 768}
    assert plan.situations == SITUATIONS
    assert plan.rounds == MIN_ROUNDS == 9


def test_the_quick_grid_takes_at_most_six_minutes() -> None:
    plan = make_plan(quick=True, **MODEL)
    assert plan.cells == (Cell(2048, 32),)
    assert plan.seconds() <= 360
    assert plan.servers == (Server.PLAIN, Server.MEMOS)


@pytest.mark.parametrize("speed", [640.0, 1100.0, 2200.0, 20_000.0])
def test_on_a_slower_machine_the_quick_grid_has_a_shorter_memory(speed: float) -> None:
    plan = make_plan(quick=True, expected_prefill=speed, **MODEL)
    (cell,) = plan.cells
    assert plan.seconds() <= 360
    assert (cell.memory_tokens < 3072) == (speed < 20_000)


def test_the_quick_grid_takes_the_memory_that_it_is_given() -> None:
    plan = make_plan(quick=True, memory=[6144], expected_prefill=100.0, **MODEL)
    assert plan.memory_tokens == (6144,)
    assert plan.max_model_len >= 6144 + 32


def test_a_model_with_a_short_context_gets_the_lengths_that_fit() -> None:
    plan = make_plan(quick=False, max_model_len=2048, block_tokens=128)
    assert plan.memory_tokens == (512, 1024)


def test_a_quarter_of_the_pool_holds_the_longest_memory_and_the_whole_the_longest_request() -> None:
    plan = make_plan(quick=False, memory=[3072], **MODEL)
    assert plan.pool_blocks // 4 * 128 >= 3072
    short = make_plan(quick=False, memory=[512], **MODEL)
    assert short.pool_blocks * 128 >= 8192


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"memory": [8000]}, "memory can have 7264 at most"),
        ({"memory": [100]}, "whole KV blocks of 128"),
        ({"queries": ["huge"]}, "unknown query length 'huge'; there are short, medium, long"),
        ({"situations": ["memos-fast"]}, "unknown situation 'memos-fast'"),
        ({"rounds": 0}, "--rounds must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(asked: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make_plan(quick=False, **MODEL, **asked)  # type: ignore[arg-type]


def test_leaving_a_server_out_leaves_its_rows_out() -> None:
    plan = make_plan(quick=False, **MODEL).without(Server.LMCACHE)
    assert Server.LMCACHE not in plan.servers
    assert "lmcache" not in {one.name for one in plan.situations}
    assert len(plan.situations) == len(SITUATIONS) - 1


def fault(name: str, *, cached: int, source: str = "") -> str:
    return fault_of(
        BY_NAME[name],
        memory_tokens=3083,
        prompt_tokens=3150,
        query_tokens=32,
        cached_tokens=cached,
        source=source,
        block_tokens=128,
    )


@pytest.mark.parametrize(
    ("name", "cached", "source"),
    [
        ("direct", 0, ""),
        ("direct", 128, ""),
        ("apc-warm", 3072, ""),
        ("apc-flooded", 0, ""),
        ("memos-resident", 3072, "resident"),
        ("memos-store", 3072, "store"),
        ("lmcache", 3072, ""),
    ],
)
def test_a_sample_that_shows_what_its_row_claims_counts(
    name: str, cached: int, source: str
) -> None:
    assert fault(name, cached=cached, source=source) == ""


@pytest.mark.parametrize(
    ("name", "cached", "source", "said"),
    [
        ("direct", 3072, "", "3072 tokens were reused, at most 128"),
        ("apc-warm", 0, "", "only 0 tokens were reused, not 3072"),
        ("apc-warm", 3149, "", "3149 tokens were reused, at most 3118"),
        ("apc-flooded", 1024, "", "1024 tokens were reused"),
        ("memos-store", 3072, "resident", "the connector says 'resident', not 'store'"),
        ("memos-resident", 0, "computed", "'computed'"),
        ("lmcache", 128, "", "only 128"),
    ],
)
def test_a_sample_that_shows_something_else_is_a_fault(
    name: str, cached: int, source: str, said: str
) -> None:
    assert said in fault(name, cached=cached, source=source)


@pytest.mark.parametrize(("blocks", "at_once"), [(12, 1), (36, 3), (300, 4)])
def test_a_flood_leaves_memory_its_quarter_of_the_pool(blocks: int, at_once: int) -> None:
    assert concurrency_of(Pool(blocks, 128)) == at_once
