"""The rounds: every row of every cell once a round, in an order that chance decides."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memos_vllm.bench.fleet import SERVED, Fleet, data_dir, drop_page_cache
from memos_vllm.bench.flood import flood, read_pool
from memos_vllm.bench.plan import Plan
from memos_vllm.bench.progress import Report
from memos_vllm.bench.prompts import Memory, Prompts
from memos_vllm.bench.record import Build, Cell, Sample
from memos_vllm.bench.situations import SITUATIONS, Server, Situation, State, fault_of
from memos_vllm.bench.streams import Timed, timed_chat
from memos_vllm.client import MOS
from memos_vllm.errors import MemosError

_ANSWER_TOKENS = 4
_BAKE_SECONDS = 600.0
# Of the question that brings memory into the pool, and is not timed.
_PRIMING_TOKENS = 32

# What everything is compared with, and what is compared.
REQUIRED = frozenset({Server.PLAIN, Server.MEMOS})

Skip = Callable[[Server, str], None]


@dataclass(frozen=True, slots=True)
class Asking:
    """What goes into a chat besides the question.

    Attributes:
        question: the only one that may be asked; None for any new one.
    """

    memory: Memory | None
    body: dict[str, Any]
    question: list[dict[str, Any]] | None = None


class Rounds:
    """Measures a plan on servers that run.

    Args:
        fleet: every server of the plan, started.
        folder: with the servers' data.

    Attributes:
        memories: what is known to the model, by its length in tokens.
    """

    def __init__(
        self, fleet: Fleet, plan: Plan, prompts: Prompts, *, folder: Path, seed: int
    ) -> None:
        self._fleet = fleet
        self._plan = plan
        self._prompts = prompts
        self._folder = folder
        self._random = random.Random(seed)
        self.memories = {tokens: prompts.memory(tokens) for tokens in plan.memory_tokens}
        # Asked under one salt for each row, so that no row finds what another has computed.
        self._salts = {
            (situation.name, tokens): prompts.salt()
            for situation in SITUATIONS
            for tokens in plan.memory_tokens
        }
        fleet.client(Server.PLAIN)
        self._pool = read_pool(fleet.url(Server.PLAIN))

    # --- before the rounds ----------------------------------------------------------------

    def warm_up(self, skip: Skip) -> None:
        """The first chats of a process set up what later ones find.

        Args:
            skip: told of a server that does not answer, and why: it takes no further part.
        Raises:
            MemosError: it is one that everything is compared with.
        """
        for server in self._plan.servers:
            try:
                for _ in range(2):
                    self._hello(server)
            except MemosError as error:
                self._leave_out(server, error, skip)

    def prefill_tokens_a_second(self) -> float:
        """How fast this machine computes a prompt: what the plan's time follows from."""
        longest = max(self.memories.values(), key=lambda memory: memory.num_tokens)
        asking = Asking(longest, {"cache_salt": self._prompts.salt()})
        reply = self._chat(Server.PLAIN, asking, query_tokens=_PRIMING_TOKENS)
        return reply.prompt_tokens / reply.ttft_seconds

    def bake(self, skip: Skip) -> Iterator[Build]:
        """Make a cube for every length of memory on every server with cubes, and keep its KV.

        Args:
            skip: as of `warm_up`.
        """
        for server in self._plan.servers:
            if not server.has_cubes:
                continue
            try:
                yield from self._baked(server)
            except MemosError as error:
                self._leave_out(server, error, skip)

    def _baked(self, server: Server) -> Iterator[Build]:
        self._fleet.client(server)
        with MOS(self._fleet.url(server)) as mos:
            for tokens, memory in self.memories.items():
                cube = mos.create_cube(cube_id(tokens))
                cube.add([{"text": note.text} for note in memory.notes])
                started = time.perf_counter()
                cube.promote("all", to="activation", wait=True, timeout_seconds=_BAKE_SECONDS)
                seconds = time.perf_counter() - started
                yield Build(server, tokens, seconds, cube.info().activation.bytes)

    def _leave_out(self, server: Server, error: MemosError, skip: Skip) -> None:
        if server in REQUIRED:
            raise error
        self._plan = self._plan.without(server)
        skip(server, str(error))

    @property
    def plan(self) -> Plan:
        """What is measured: the plan without the servers that failed."""
        return self._plan

    # --- the rounds -----------------------------------------------------------------------

    def run(self, report: Report) -> Iterator[Sample]:
        """The samples of one round after the other."""
        total = len(self._plan.cells) * len(self._plan.situations) * self._plan.rounds
        done = 0
        for number in range(self._plan.rounds):
            for order, (cell, situation) in enumerate(self._drawn()):
                report(done / total, f"round {number + 1}: {situation.name}, {cell} tokens")
                yield self._sample(situation, cell, number=number, order=order)
                done += 1
        report(1.0, "all rounds done")

    def _drawn(self) -> list[tuple[Cell, Situation]]:
        """Every row once. The rows of a cell are neighbours, since they are compared; cells take
        turns, so that what a minute does to the machine does not fall on one of them always."""
        plan, draw = self._plan, self._random.sample
        return [
            (cell, situation)
            for cell in draw(plan.cells, k=len(plan.cells))
            for situation in draw(plan.situations, k=len(plan.situations))
        ]

    def _sample(self, situation: Situation, cell: Cell, *, number: int, order: int) -> Sample:
        try:
            asking = self.prepare(situation, cell)
            # A stranger's chat before each sample: the same prefix just before would be worth a
            # tenth.
            self._hello(situation.server)
            reply = self._chat(situation.server, asking, query_tokens=cell.query_tokens)
        except MemosError as error:
            return Sample(
                cell, situation.name, number, order, 0.0, 0.0, 0, 0, 0, fault=str(error)[:300]
            )
        source = str(reply.activation.get("source", ""))
        fault = fault_of(
            situation,
            memory_tokens=0 if asking.memory is None else asking.memory.num_tokens,
            prompt_tokens=reply.prompt_tokens,
            query_tokens=cell.query_tokens,
            cached_tokens=reply.cached_tokens,
            source=source,
            block_tokens=self._pool.block_size,
        )
        return Sample(
            cell,
            situation.name,
            number,
            order,
            reply.ttft_seconds,
            reply.total_seconds,
            reply.prompt_tokens,
            reply.cached_tokens,
            reply.completion_tokens,
            source,
            fault,
        )

    def prepare(self, situation: Situation, cell: Cell) -> Asking:
        """Bring the server into the row's state.

        Raises:
            MemosError: it would not come into it.
        """
        asking = self._asking(situation, cell.memory_tokens)
        if situation.whole_prompts:
            # It keeps every prompt for good, and of those before none is asked for again.
            for kept in (self._folder / situation.server).glob("*"):
                shutil.rmtree(kept, ignore_errors=True)
            question = self._prompts.question(cell.query_tokens)
            asking = dataclasses.replace(asking, question=question)
        server = situation.server
        if situation.state is State.FLOODED:
            # Or what other rows asked for stays in the pool in this memory's place.
            self._fleet.empty_pool(server)
        if situation.state in {State.WARM, State.FLOODED, State.NOT_RESIDENT}:
            self._chat(server, asking, query_tokens=_PRIMING_TOKENS)
        if situation.state is State.FLOODED:
            self._fleet.client(server)
            seed = self._random.randrange(2**32)
            asyncio.run(flood(self._fleet.url(server), self._pool, seed=seed))
        elif situation.state is State.NOT_RESIDENT:
            self._fleet.empty_pool(server)
        elif situation.state is State.RESTARTED:
            self._fleet.restart(server)
        elif situation.state is State.RESTARTED_COLD:
            artifacts = data_dir(self._folder, server) / "artifacts"
            self._fleet.restart(server, between=lambda: drop_page_cache(artifacts))
        return asking

    def messages(self, asking: Asking, question: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The question as it is sent: with memory before it, unless a cube has that."""
        if asking.memory is None or "memcube_id" in asking.body:
            return list(question)
        return self._prompts.with_memory(question, asking.memory)

    def _asking(self, situation: Situation, memory_tokens: int) -> Asking:
        if situation.state is State.ABSENT:
            return Asking(None, {})
        memory = self.memories[memory_tokens]
        if situation.server.has_cubes:
            return Asking(memory, {"memcube_id": cube_id(memory_tokens)})
        salt = (
            self._prompts.salt()
            if situation.state is State.UNSEEN
            else self._salts[situation.name, memory_tokens]
        )
        return Asking(memory, {"cache_salt": salt})

    def _chat(self, server: Server, asking: Asking, *, query_tokens: int) -> Timed:
        client = self._fleet.client(server)
        question = asking.question or self._prompts.question(query_tokens)
        return timed_chat(
            client,
            self.messages(asking, question),
            model=SERVED,
            max_tokens=_ANSWER_TOKENS,
            **asking.body,
        )

    def _hello(self, server: Server) -> None:
        hello = [{"role": "user", "content": f"Say hello to {self._prompts.filler(4)}."}]
        timed_chat(self._fleet.client(server), hello, model=SERVED, max_tokens=1)


def cube_id(memory_tokens: int) -> str:
    """The cube that holds a memory of this length."""
    return f"memory-{memory_tokens}"
