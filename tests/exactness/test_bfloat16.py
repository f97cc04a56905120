"""With bfloat16: equal to plain vLLM's warm prefix cache, and elsewhere no noisier than plain vLLM.

Plain vLLM does not agree with itself in bfloat16, so its own disagreement is measured first, on
the same server and prompts; nothing here compares with a number from elsewhere. The tests run
in file order: the server is killed and started again between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from memory_server import MemoryServer, memory_chats
from prompts import QUESTIONS, composed_messages

from memos_vllm.bench.yardstick import (
    Answer,
    Comparison,
    Yardstick,
    chance_of,
    cold,
    compare,
    measure,
    table,
)

pytestmark = pytest.mark.server

CONVERSATIONS = [composed_messages(question) for question in QUESTIONS]
CUBES = tuple(f"cube-{number}" for number in range(len(QUESTIONS)))
BAKED = "baked"

# 44 blocks of 128 tokens: a flood of two pools takes seconds.
OPTIONS = ("--dtype", "bfloat16", "--num-gpu-blocks-override", "44")

# Concurrent answers depend on how requests fall into batches, so the count of differences is a
# draw; it is refused when plain vLLM's own noise would give so many less often than this.
UNLIKELY = 0.01

Launch = Callable[..., MemoryServer]
Note = Callable[[str], None]


@pytest.fixture(scope="module")
def server(launch: Launch) -> MemoryServer:
    server = launch(*OPTIONS, unbaked=CUBES)
    server.bake_cube(BAKED)
    return server


@pytest.fixture(scope="module")
def measured(server: MemoryServer, note: Note) -> tuple[Yardstick, dict[str, list[Answer]]]:
    """Plain vLLM against itself; its warm runs have cached what a bake computes."""
    answer = server.asker.ask(memory_chats(BAKED)[0])
    baked_prompt = answer.prompt_ids[: answer.memory_tokens + 1]
    yardstick, runs = measure(server.asker, CONVERSATIONS, head=baked_prompt)
    note(table(yardstick))
    return yardstick, runs


@pytest.fixture(scope="module")
def yardstick(measured: tuple[Yardstick, dict[str, list[Answer]]]) -> Yardstick:
    return measured[0]


@pytest.fixture(scope="module")
def warm(measured: tuple[Yardstick, dict[str, list[Answer]]]) -> list[Answer]:
    """Plain vLLM's answers from its warm prefix cache, one by one."""
    return measured[1]["warm"]


@pytest.fixture(scope="module")
def from_scratch(measured: tuple[Yardstick, dict[str, list[Answer]]]) -> list[Answer]:
    return measured[1]["cold"]


def assert_identical(run: Sequence[Answer], warm: Sequence[Answer]) -> None:
    """The same tokens, and the same log probabilities to the last bit."""
    assert [answer.cached_tokens for answer in run] == [answer.cached_tokens for answer in warm]
    comparison = compare(run, warm)
    assert not comparison.differences, str(comparison)
    assert [answer.top for answer in run] == [answer.top for answer in warm]


def assert_within(yardstick: Yardstick, comparison: Comparison) -> None:
    """Each first difference is a near-tie, and there are no more than plain vLLM itself has."""
    noise = yardstick.noise
    assert comparison.gap <= noise.shift, f"{comparison}; plain vLLM: {noise}"
    count = len(comparison.differences)
    chance = chance_of(count, comparison.num_prompts, noise=noise)
    assert count == 0 or chance >= UNLIKELY, f"{comparison}; plain vLLM: {noise}"


def sources(run: Sequence[Answer]) -> set[str | None]:
    return {answer.source for answer in run}


def test_the_yardstick_is_worth_its_name(
    yardstick: Yardstick, warm: list[Answer], from_scratch: list[Answer]
) -> None:
    """Cold runs cached nothing, warm ones the whole memory."""
    assert {answer.cached_tokens for answer in from_scratch} <= {0, None}
    assert all((answer.cached_tokens or 0) > 0 for answer in warm)
    assert yardstick.noise.num_prompts == 6 * len(QUESTIONS)


def test_computed_memory_is_as_near_to_a_plain_prefill_as_plain_vllm_is(
    server: MemoryServer, yardstick: Yardstick, from_scratch: list[Answer], note: Note
) -> None:
    run = server.asker.ask_all(memory_chats(*CUBES))
    assert sources(run) == {"computed"}
    comparison = compare(run, from_scratch)
    note(f"memory computed, concurrent / cold: {comparison}")
    assert_within(yardstick, comparison)


def test_resident_memory_equals_the_warm_prefix_cache(
    server: MemoryServer, warm: list[Answer]
) -> None:
    run = server.asker.ask_each(memory_chats(BAKED))
    assert sources(run[1:]) == {"resident"}
    assert_identical(run, warm)


def test_memory_after_a_flood_equals_the_warm_prefix_cache(
    server: MemoryServer, warm: list[Answer]
) -> None:
    server.flood(times_the_pool=2)
    run = server.asker.ask_each(memory_chats(BAKED))
    assert sources(run) == {"resident"}
    assert_identical(run, warm)


def test_loaded_memory_equals_the_warm_prefix_cache(
    server: MemoryServer, warm: list[Answer]
) -> None:
    """After kill -9, and with the prefix cache dropped after each chat."""
    server.kill_and_restart()
    run = []
    for chat in memory_chats(BAKED):
        run.append(server.asker.ask(chat))
        server.reset_prefix_cache()
    assert sources(run) == {"store"}
    assert_identical(run, warm)


def test_concurrent_memory_is_as_near_to_a_plain_prefill_as_plain_vllm_is(
    server: MemoryServer, yardstick: Yardstick, from_scratch: list[Answer], note: Note
) -> None:
    """Sixteen at once, four of them plain; first loaded by one chat and shared by the others."""
    answers = server.asker.ask_all([*cold(CONVERSATIONS[:4]), *memory_chats(BAKED)])
    run = [answer for answer in answers if answer.source is not None]
    assert "store" in sources(run)
    assert sources(run) <= {"store", "resident"}
    comparison = compare(run, from_scratch)
    note(f"memory loaded, 16 at once / cold: {comparison}")
    assert_within(yardstick, comparison)
