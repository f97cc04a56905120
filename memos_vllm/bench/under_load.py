"""The grid's load: many chats at once over many cubes, and one cube through flood after flood."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memos_vllm.bench.fleet import SERVED, Fleet
from memos_vllm.bench.load import LoadPlan, LoadRun, run_load
from memos_vllm.bench.measure import cube_id
from memos_vllm.bench.progress import Report, piece
from memos_vllm.bench.prompts import Memory, Prompts
from memos_vllm.bench.situations import Server
from memos_vllm.bench.steady import as_user, run_steady
from memos_vllm.bench.streams import timed_chat
from memos_vllm.bench.traffic import (
    PlannedChat,
    Question,
    asking_by_prompt,
    asking_cubes,
    draw_questions,
)
from memos_vllm.client import MOS

CONCURRENCIES = (1, 4, 16)
NUM_CUBES = 24
MEMORY_TOKENS = 1024
STEADY_CHATS = 200
# Before every tenth chat other prompts fill the whole pool: a plain prefix cache loses the memory.
_STEADY_FLOOD_POOLS = 1.1
_STEADY_FLOOD_EVERY = 10
_CHATS_A_RUN = 48
_OUTPUT_TOKENS = 16
# Chats a second that arrive, at 2,200 prefilled tokens a second; a machine twice as fast gets twice
# as many. The highest is more than such a machine can prefill for.
_RATES = {1: 0.7, 4: 1.5, 16: 3.0}
_RATE_SPEED = 2200.0
_LIMIT_SECONDS = 1.0


class Library:
    """Many cubes of one length on the server with memory, most asked for first."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self.memories: dict[str, Memory] = {
            f"shelf-{number:02}": prompts.memory(MEMORY_TOKENS, variant=number)
            for number in range(1, NUM_CUBES + 1)
        }

    def fill(self, url: str) -> None:
        """Make the cubes and keep their KV."""
        with MOS(url) as mos:
            for name, memory in self.memories.items():
                cube = mos.create_cube(name)
                cube.add([{"text": note.text} for note in memory.notes])
                cube.promote("all", to="activation", wait=True)

    def compose(self, question: Question) -> list[dict[str, Any]]:
        """A question with its cube's text in the prompt."""
        assert question.cube is not None
        return self._prompts.with_memory(as_user(question.text), self.memories[question.cube])


def load_runs(
    fleet: Fleet,
    library: Library,
    *,
    tokenizer: Path,
    prefill_tokens_a_second: float,
    seed: int,
    report: Report,
) -> Iterator[dict[str, Any]]:
    """Poisson arrivals over a Zipf mix of the cubes, on plain vLLM and with memory.

    Plain vLLM has the memory in its prompts, and its prefix cache.
    """
    ways: dict[str, tuple[Server, Callable[[tuple[Question, ...]], tuple[PlannedChat, ...]]]] = {
        "apc": (
            Server.PLAIN,
            lambda asked: asking_by_prompt(asked, library.compose, output_tokens=_OUTPUT_TOKENS),
        ),
        "memos": (
            Server.MEMOS,
            lambda asked: asking_cubes(asked, output_tokens=_OUTPUT_TOKENS),
        ),
    }
    done = 0
    for concurrency in CONCURRENCIES:
        for name, (server, plan_chats) in ways.items():
            report(done / (len(CONCURRENCIES) * len(ways)), f"load: {name}, {concurrency} at once")
            # The same questions for both; new ones for each concurrency.
            questions = draw_questions(
                list(library.memories), number=_CHATS_A_RUN, seed=seed + concurrency
            )
            plan = LoadPlan(
                chats=plan_chats(questions),
                concurrency=concurrency,
                request_rate=_RATES[concurrency] * prefill_tokens_a_second / _RATE_SPEED,
                limit_seconds=_LIMIT_SECONDS,
                seed=seed,
            )
            fleet.client(server)
            run = run_load(plan, url=fleet.url(server), model=SERVED, tokenizer=tokenizer)
            yield summary(name, run)
            done += 1


def summary(situation: str, run: LoadRun) -> dict[str, Any]:
    """One line of the report, with the raw samples under it."""
    times = [one.waited_seconds + one.ttft_seconds for one in run.answered]
    # Of chats that all failed there is none.
    p50, p99 = (round(t * 1e3) for t in np.percentile(times, [50, 99])) if times else ("", "")
    return {
        "situation": situation,
        "concurrency": run.concurrency,
        "request_rate": round(run.request_rate, 2),
        "requests": len(run.requests),
        "goodput_per_second": round(run.felt_goodput_per_second, 2),
        "ttft_p50_ms": p50,
        "ttft_p99_ms": p99,
        "output_tokens_per_second": round(run.output_tokens_per_second, 1),
        "tokens_per_second_a_chat": round(
            float(np.median(run.tokens_per_second(with_memory=True) or (0.0,))), 1
        ),
        "errors": len(run.errors),
        "sources": dict(run.sources),
        "limit_seconds": run.limit_seconds,
        "samples": [dataclasses.asdict(one) for one in run.requests],
    }


def steady_runs(
    fleet: Fleet,
    prompts: Prompts,
    memory: Memory,
    *,
    memory_tokens: int,
    seed: int,
    report: Report,
) -> Iterator[dict[str, Any]]:
    """Chats about one memory while floods of other prompts cycle the pool, on both servers."""
    salt = prompts.salt()
    ways: dict[str, tuple[Server, dict[str, object], Callable[[str], list[dict[str, Any]]]]] = {
        "memos-flooded": (Server.MEMOS, {"memcube_id": cube_id(memory_tokens)}, as_user),
        "apc-flooded": (
            Server.PLAIN,
            {"cache_salt": salt},
            lambda text: prompts.with_memory(as_user(text), memory),
        ),
    }
    for number, (name, (server, body, compose)) in enumerate(ways.items()):
        # Or what the runs before asked for stays in the pool in this memory's place.
        fleet.empty_pool(server)
        timed_chat(fleet.client(server), compose("Hello."), model=SERVED, max_tokens=1, **body)
        run = run_steady(
            fleet.client(server),
            model=SERVED,
            body=body,
            compose=compose,
            chats=STEADY_CHATS,
            flood_pools=_STEADY_FLOOD_POOLS,
            flood_every=_STEADY_FLOOD_EVERY,
            seed=seed,
            report=piece(report, number, len(ways)),
        )
        flat = run.after_floods
        yield {
            "situation": name,
            "pools_flooded": run.pools_flooded,
            "sources": dict(run.sources),
            "growth": flat.growth,
            "growth_interval": flat.growth_interval,
            "last_to_first": flat.last_to_first,
            "machine_growth_interval": run.machine.growth_interval,
            "samples": [dataclasses.asdict(chat) for chat in run.chats],
        }
