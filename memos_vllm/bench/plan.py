"""Which cells and situations are measured, how large the pool is, and how long it will take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from memos_vllm.bench.flood import FLOOD_SHARE
from memos_vllm.bench.record import Cell
from memos_vllm.bench.situations import (
    BY_NAME,
    QUICK,
    SITUATIONS,
    Answers,
    Server,
    Situation,
    State,
)
from memos_vllm.errors import ConfigurationError

MEMORY_TOKENS = (512, 1024, 2048, 3072)
QUERY_TOKENS = {"short": 32, "medium": 256, "long": 768}
MIN_ROUNDS = 9
# Template, answer, and what the tokenizer makes of a question's seam.
_PROMPT_MARGIN = 160
# Memory may keep a quarter of the pool unless the operator says otherwise.
_POOL_SHARE = 4
# One chat with nothing to compute, and a start, on 2 cores; they only say how long it takes.
_CHAT_SECONDS = 0.2
_START_SECONDS = 22.0
# Of the second that a stopped server is given: about every other sample is of another server.
_SETTLE_SECONDS = 0.5
_PREFILL_TOKENS_A_SECOND = 2200.0
_COSTS_SECONDS_A_ROUND = 25.0
_LOAD_SECONDS = 600.0
# What --quick keeps within, where the machine is fast enough for any length of memory.
QUICK_SECONDS = 360.0
# Estimates are off by some: what is planned keeps within this share of it.
_QUICK_SHARE = 0.92
# Its context at least: the prompts of a flood are to fit.
_QUICK_MODEL_LEN = 2048
_STEADY_FLOODS = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        rounds: samples of each row, at least 9 for intervals that mean something.
        probes: whether answers are compared with plain vLLM's.
        costs: whether plain traffic and saves are measured.
        load: whether many chats at once, and one cube through many floods, are.
        expected_prefill: prompt tokens a second, until it is measured.
    """

    cells: tuple[Cell, ...]
    situations: tuple[Situation, ...]
    rounds: int
    block_tokens: int
    max_model_len: int
    probes: bool = True
    costs: bool = True
    load: bool = True
    expected_prefill: float = _PREFILL_TOKENS_A_SECOND

    @property
    def servers(self) -> tuple[Server, ...]:
        """Plain vLLM always: rows are compared with it."""
        wanted = {situation.server for situation in self.situations} | {Server.PLAIN}
        if self.costs or self.load:
            wanted.add(Server.MEMOS)
        return tuple(server for server in Server if server in wanted)

    @property
    def memory_tokens(self) -> tuple[int, ...]:
        return tuple(sorted({cell.memory_tokens for cell in self.cells}))

    @property
    def pool_blocks(self) -> int:
        """Small, so that a flood is short; a quarter of it holds the longest memory and a bit,
        and the whole the longest request that the model takes."""
        longest = max(self.memory_tokens)
        kept = _POOL_SHARE * (math.ceil(longest / self.block_tokens) + 2)
        return max(kept, math.ceil(self.max_model_len / self.block_tokens) + 4)

    @property
    def flood_tokens(self) -> float:
        return FLOOD_SHARE * self.pool_blocks * self.block_tokens

    def without(self, server: Server) -> Plan:
        """The same without a server that cannot take part."""
        kept = tuple(one for one in self.situations if one.server is not server)
        return dataclasses.replace(self, situations=kept)

    @property
    def compared(self) -> tuple[Situation, ...]:
        """The rows whose answers are held against plain vLLM's."""
        return tuple(one for one in self.situations if one.answers is not Answers.REFERENCE)

    def seconds(self, prefill_tokens_a_second: float | None = None) -> float:
        """About how long it takes at this speed, or the expected one."""
        start = _START_SECONDS * len(self.servers)
        return start + sum(self.parts(prefill_tokens_a_second).values())

    def parts(self, prefill_tokens_a_second: float | None = None) -> dict[str, float]:
        """What follows the start, in its order, and the seconds that each should take."""
        prefill = prefill_tokens_a_second or self.expected_prefill
        seconds = {
            "rounds": sum(
                self.rounds * self._sample_seconds(situation, cell, prefill)
                for cell in self.cells
                for situation in self.situations
            )
        }
        if self.probes:
            seconds["answers"] = sum(
                18 * (tokens / prefill + 1.5) + 12.0 * len(self.compared)
                for tokens in self.memory_tokens
            )
        if self.costs:
            seconds["costs"] = self.rounds * _COSTS_SECONDS_A_ROUND
        if self.load:
            seconds["load"] = _LOAD_SECONDS
            seconds["floods"] = 2 * _STEADY_FLOODS * self.flood_tokens / prefill
        return seconds

    def _sample_seconds(self, situation: Situation, cell: Cell, prefill: float) -> float:
        whole = (cell.memory_tokens + cell.query_tokens) / prefill
        asked = _SETTLE_SECONDS + 2 * _CHAT_SECONDS + cell.query_tokens / prefill
        flood = self.flood_tokens / prefill
        return (
            asked
            + {
                State.ABSENT: 0.0,
                State.UNSEEN: whole,
                State.WARM: _CHAT_SECONDS,
                State.FLOODED: flood + whole,
                State.NOT_RESIDENT: _CHAT_SECONDS,
                State.RESTARTED: _START_SECONDS,
                State.RESTARTED_COLD: _START_SECONDS,
            }[situation.state]
        )


def make_plan(
    *,
    quick: bool,
    max_model_len: int,
    block_tokens: int,
    memory: Sequence[int] = (),
    queries: Sequence[str] = (),
    situations: Sequence[str] = (),
    rounds: int = MIN_ROUNDS,
    probes: bool = True,
    costs: bool | None = None,
    load: bool | None = None,
    expected_prefill: float = _PREFILL_TOKENS_A_SECOND,
) -> Plan:
    """The full grid, the quick one, or what was asked for.

    The quick one has the longest usual memory with which it ends within `QUICK_SECONDS`.

    Args:
        max_model_len: tokens that prompt and answer may have together.
        memory: lengths in tokens; by default the usual ones, then doubling as far as the model
            allows.
        queries: short, medium, long.
        costs, load: by default with the full grid only.
    Raises:
        ConfigurationError: an unknown name, or a length that the model cannot hold.
    """
    _known(queries, QUERY_TOKENS, what="query length")
    _known(situations, BY_NAME, what="situation")
    if rounds < 1:
        raise ConfigurationError("--rounds must be at least 1")
    chosen_queries = list(queries) or (["short"] if quick else list(QUERY_TOKENS))
    longest_query = max(QUERY_TOKENS[name] for name in chosen_queries)
    room = max_model_len - longest_query - _PROMPT_MARGIN
    lengths = list(memory) or _lengths(room, quick=quick)
    too_long = [tokens for tokens in lengths if tokens > room]
    if too_long or not lengths:
        raise ConfigurationError(
            f"the model takes {max_model_len} tokens, so with a query of {longest_query} memory "
            f"can have {max(0, room)} at most; name shorter ones with --memory"
        )
    if min(lengths) < block_tokens:
        raise ConfigurationError(
            f"only whole KV blocks of {block_tokens} tokens are reused; a memory of "
            f"{min(lengths)} has none"
        )
    names = situations or (QUICK if quick else [situation.name for situation in SITUATIONS])
    plan = Plan(
        cells=(),
        situations=tuple(one for one in SITUATIONS if one.name in set(names)),
        rounds=rounds,
        block_tokens=block_tokens,
        max_model_len=max_model_len,
        probes=probes,
        costs=not quick if costs is None else costs,
        load=not quick if load is None else load,
        expected_prefill=expected_prefill,
    )

    def with_memory(tokens: Sequence[int]) -> Plan:
        cells = [
            Cell(n, QUERY_TOKENS[name]) for n in sorted(set(tokens)) for name in chosen_queries
        ]
        needed = max(_QUICK_MODEL_LEN, max(tokens) + longest_query + _PROMPT_MARGIN)
        # A shorter context needs a smaller pool, which other prompts fill sooner.
        kept = min(max_model_len, needed) if quick else max_model_len
        return dataclasses.replace(plan, cells=tuple(cells), max_model_len=kept)

    if memory or not quick:
        return with_memory(lengths)
    choices = [with_memory([tokens]) for tokens in sorted(lengths, reverse=True)]
    most = _QUICK_SHARE * QUICK_SECONDS
    return next((one for one in choices if one.seconds() <= most), choices[-1])


def _lengths(room: int, *, quick: bool) -> list[int]:
    usual = [tokens for tokens in MEMORY_TOKENS if tokens <= room]
    if quick:
        return usual
    doubled = 2 * MEMORY_TOKENS[-1]
    while doubled <= room:
        usual.append(doubled)
        doubled *= 2
    return usual


def _known(names: Sequence[str], known: Collection[str], *, what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigurationError(f"unknown {what} '{name}'; there are {', '.join(known)}")
