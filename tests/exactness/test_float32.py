"""With float32, 64 greedy tokens of twelve prompts equal a prefill from scratch, in each state.

The tests of one server run in file order: each leaves the state that the next begins with, and
asserts that it is the state it means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from memory_server import MemoryServer, memory_chats
from prompts import QUESTIONS, composed_messages

from memos_vllm.bench.yardstick import MAX_TOKENS, Answer, Chat, cold, compare

pytestmark = pytest.mark.server

CONVERSATIONS = [composed_messages(question) for question in QUESTIONS]
CUBES = tuple(f"cube-{number}" for number in range(len(QUESTIONS)))

# 44 blocks of 128 tokens: each state turns it over, and a flood of two pools takes seconds.
DEFAULT = ("--dtype", "float32", "--num-gpu-blocks-override", "44")
# A head of 25 blocks, and too little for what the preemption test asks for at once.
SMALL = (
    *("--dtype", "float32", "--block-size", "32", "--num-gpu-blocks-override", "96"),
    *("--max-num-batched-tokens", "256", "--residency-fraction", "0.5"),
)
UNCACHED = (*DEFAULT, "--no-enable-prefix-caching")

Launch = Callable[..., MemoryServer]


@pytest.fixture(scope="module")
def default(launch: Launch) -> MemoryServer:
    return launch(*DEFAULT, unbaked=CUBES)


@pytest.fixture(scope="module")
def from_scratch(default: MemoryServer) -> list[Answer]:
    """Plain chats of which nothing was cached, what every state is held against."""
    return default.asker.ask_all(cold(CONVERSATIONS))


def assert_equal(run: Sequence[Answer], reference: Sequence[Answer]) -> None:
    assert all(len(answer.token_ids) == MAX_TOKENS for answer in run)
    comparison = compare(run, reference)
    assert not comparison.differences, str(comparison)


def sources(run: Sequence[Answer]) -> set[str | None]:
    return {answer.source for answer in run}


def test_plain_vllm_is_batch_invariant_in_float32(
    default: MemoryServer, from_scratch: list[Answer]
) -> None:
    """The ground that the equalities below stand on: a batch changes no greedy token."""
    assert {answer.cached_tokens for answer in from_scratch} <= {0, None}
    one_by_one = default.asker.ask_each(cold(CONVERSATIONS[:4]))
    assert_equal(one_by_one, from_scratch[:4])


class TestDefault:
    """Block size 128, one process life after another."""

    def test_computed(self, default: MemoryServer, from_scratch: list[Answer]) -> None:
        run = default.asker.ask_all(memory_chats(*CUBES))
        assert sources(run) == {"computed"}
        assert_equal(run, from_scratch)
        default.wait_until_stored(len(CUBES))

    def test_resident_beside_plain_chats(
        self, default: MemoryServer, from_scratch: list[Answer]
    ) -> None:
        """Sixteen at once: twelve with memory, four that carry the same text as plain prompts."""
        default.reset_prefix_cache()
        default.asker.ask(memory_chats(CUBES[0])[0])
        chats = memory_chats(CUBES[0])
        mixed = interleave(chats, cold(CONVERSATIONS[:4]))
        answers = default.asker.ask_all(mixed)
        run = [answer for answer in answers if answer.source is not None]
        plain = [answer for answer in answers if answer.source is None]
        assert sources(run) == {"resident"}
        assert_equal(run, from_scratch)
        assert_equal(plain, from_scratch[:4])

    def test_after_a_flood(self, default: MemoryServer, from_scratch: list[Answer]) -> None:
        default.flood(times_the_pool=2)
        run = default.asker.ask_all(memory_chats(CUBES[0]))
        assert sources(run) == {"resident"}
        assert_equal(run, from_scratch)

    def test_loaded_after_kill_and_restart(
        self, default: MemoryServer, from_scratch: list[Answer]
    ) -> None:
        default.kill_and_restart()
        run = default.asker.ask_all(memory_chats(*CUBES))
        assert sources(run) == {"store"}
        assert_equal(run, from_scratch)


@pytest.fixture(scope="module")
def small(from_scratch: list[Answer], launch: Launch) -> MemoryServer:
    """Block size 32, 256 tokens a step, a tiny pool; `from_scratch` is computed before."""
    return launch(*SMALL, unbaked=CUBES)


class TestSmall:
    def test_computed_in_small_chunks(
        self, small: MemoryServer, from_scratch: list[Answer]
    ) -> None:
        run = small.asker.ask_all(memory_chats(*CUBES))
        assert sources(run) == {"computed"}
        assert_equal(run, from_scratch)
        small.wait_until_stored(len(CUBES))

    def test_loaded(self, small: MemoryServer, from_scratch: list[Answer]) -> None:
        small.reset_prefix_cache()
        run = small.asker.ask_all(memory_chats(*CUBES))
        assert sources(run) == {"store"}
        assert_equal(run, from_scratch)

    def test_after_a_flood(self, small: MemoryServer, from_scratch: list[Answer]) -> None:
        # Used most, so that it is the one that stays within the residency budget.
        small.asker.ask_all(memory_chats(CUBES[0]))
        small.flood(times_the_pool=2)
        run = small.asker.ask_all(memory_chats(CUBES[0]))
        assert sources(run) == {"resident"}
        assert_equal(run, from_scratch)

    def test_preempted(self, small: MemoryServer, from_scratch: list[Answer]) -> None:
        """Long plain generations, admitted first, take the blocks of the chats that run."""
        before = small.metric("vllm:num_preemptions_total")
        long = [
            Chat([{"role": "user", "content": f"Tell story {number}."}], {"max_tokens": 320})
            for number in range(6)
        ]
        answers = small.asker.ask_all([*long, *memory_chats(CUBES[0])])
        run = answers[len(long) :]
        assert small.metric("vllm:num_preemptions_total") > before
        assert sources(run) <= {"resident", "store"}
        assert_equal(run, from_scratch)


@pytest.fixture(scope="module")
def uncached(from_scratch: list[Answer], launch: Launch) -> MemoryServer:
    server = launch(*UNCACHED)
    server.bake_cube("baked")
    return server


class TestWithoutPrefixCaching:
    def test_loaded_each_time(self, uncached: MemoryServer, from_scratch: list[Answer]) -> None:
        run = uncached.asker.ask_all(memory_chats("baked"))
        assert sources(run) == {"store"}
        assert_equal(run, from_scratch)


def interleave(chats: Sequence[Chat], others: Sequence[Chat]) -> list[Chat]:
    """The others spread evenly among the chats."""
    every = len(chats) // len(others)
    mixed = list(chats)
    for index, other in enumerate(others):
        mixed.insert(index * (every + 1), other)
    return mixed
