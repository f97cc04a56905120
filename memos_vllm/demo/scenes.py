"""What the demo shows, scene by scene, on a server that runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memos_vllm.activation.prefix import Message, compose_messages, render_memory_block
from memos_vllm.activation.templates import load_template, probe_template
from memos_vllm.bench.flood import flood, read_pool
from memos_vllm.client import MOS
from memos_vllm.client.errors import ApiNotFound
from memos_vllm.client.objects import MemoryInfo
from memos_vllm.demo.handbook import Question, Section, demo_call_question, demo_calls
from memos_vllm.demo.report import Results, seconds_text
from memos_vllm.demo.screen import Screen
from memos_vllm.demo.timing import Measurement, Sample, ask_cube, ask_plainly

CUBE_ID = "pellworm-handbook"
CALLS_ID = "pellworm-calls"
WARM_UP = "What is the capital of France? Answer in one sentence."
_ANSWER_OPTIONS = {"temperature": 0, "max_tokens": 32}


@dataclass(frozen=True, slots=True)
class Samples:
    """How often each time is taken; a cold start is taken once."""

    scratch: int = 3
    warm: int = 7
    floods: int = 3


QUICK = Samples(scratch=1, warm=2, floods=1)


class Show:
    """The scenes, in the order in which they are played.

    Args:
        screen: where they are shown.
        model: the prepared model's folder.
        sections: of the handbook; each becomes one memory.
        samples: how often each time is taken.
    """

    def __init__(
        self, screen: Screen, *, model: Path, sections: Sequence[Section], samples: Samples
    ) -> None:
        self._screen = screen
        self._sections = list(sections)
        self._samples = samples
        self._traits = probe_template(load_template(model))
        self._fresh = _fresh_questions(sections)
        self._scratch = Measurement("from scratch")
        self._plain_warm = Measurement("plain vLLM, warm prefix cache")
        self._resident = Measurement("cube, resident")
        self._plain_flooded = Measurement("plain vLLM, after the flood")
        self._flooded = Measurement("cube, after the flood")
        self._restarted = Measurement("cube, first request after kill -9")

    @property
    def results(self) -> Results:
        return Results(
            self._scratch,
            self._plain_warm,
            self._resident,
            self._plain_flooded,
            self._flooded,
            self._restarted,
        )

    def warm_up(self, mos: MOS) -> None:
        """One request that has nothing to do with memory, as a server's first is always slow."""
        reply = mos.chat(WARM_UP, options=_ANSWER_OPTIONS)
        self._screen.line(f'One unrelated request to warm up: {WARM_UP} "{reply.text.strip()}"')

    def fill_cube(self, mos: MOS) -> None:
        """Have a cube that holds the handbook, one memory for each section."""
        cube = mos.cube(CUBE_ID)
        try:
            held = [_title_and_text(memory) for memory in cube.memories(state="active")]
        except ApiNotFound:
            held = None
        if held is not None and sorted(held) == sorted((s.title, s.text) for s in self._sections):
            self._screen.line(f"The cube {CUBE_ID} holds the handbook from an earlier run.")
            return
        if held is not None:
            cube.delete()
        cube = mos.create_cube(CUBE_ID, name="The handbook of Pellworm Lantern Company")
        cube.add(
            [
                {
                    "text": section.text,
                    "source": {"kind": "document", "uri": "handbook.md", "title": section.title},
                }
                for section in self._sections
            ]
        )
        self._screen.line(f"Made the cube {CUBE_ID} with {len(self._sections)} memories.")

    def bake(self, mos: MOS) -> None:
        """Have the cube's memory compiled into KV."""
        cube = mos.cube(CUBE_ID)
        before = cube.info().activation
        if before.state != "ready":
            with self._screen.working("Computing the KV of the handbook, once"):
                job = cube.promote("all", to="activation", wait=True)
            self._screen.line(f"The server: {job.message}.")
        now = cube.info().activation
        kept = "Kept from an earlier run" if before.state == "ready" else "Kept"
        self._screen.line(f"{kept}: {now.tokens:,} tokens, {now.bytes / 2**20:.0f} MiB on disk.")

    def ask_without(self, mos: MOS, question: Question) -> None:
        """Show that the model alone does not know."""
        self._screen.line(question.question)
        self._show_answer("without the cube", question, self._answer(mos, question))

    def ask_both_ways(self, mos: MOS, questions: Sequence[Question]) -> None:
        """Ask each question without and with the cube."""
        cube = mos.cube(CUBE_ID)
        for question in questions:
            self.ask_without(mos, question)
            reply = cube.chat(question.question, options=_ANSWER_OPTIONS)
            self._show_answer("with the cube", question, reply.text)
            if reply.memos is not None:
                use = reply.memos.activation
                self._screen.line(
                    f"{'':<18} {use.cached_tokens:,} of {use.tokens:,} memory tokens were not "
                    f"computed again; source: {use.source}",
                    style="dim",
                )

    def show_found(self, mos: MOS) -> None:
        """Ask about earlier calls, whose turns are found by search and not in attention."""
        with contextlib.suppress(ApiNotFound):
            mos.delete_cube(CALLS_ID)
        cube = mos.create_cube(CALLS_ID, name="Calls of customers")
        cube.add_turns(demo_calls(), session_id="call-1")
        self._screen.line(f"Made the cube {CALLS_ID} with {len(demo_calls())} turns of a call.")
        question = demo_call_question()
        self._screen.line(question.question)
        reply = cube.chat(question.question, options=_ANSWER_OPTIONS)
        self._show_answer("with the cube", question, reply.text)
        for found in reply.memos.retrieved[:2] if reply.memos is not None else ():
            self._screen.line(
                f"{'':<18} note {found.number} of its prompt: {found.source}, score "
                f"{found.score:.2f}",
                style="dim",
            )

    def measure_warm(self, mos: MOS) -> None:
        """Times from scratch, with plain vLLM's prefix cache and with the cube, in turn."""
        cube = mos.cube(CUBE_ID)
        with self._screen.working("Asking in three ways, in turn") as progress:
            # The first one fills the caches; it is not counted.
            ask_plainly(mos, self._plain_messages())
            ask_cube(cube, next(self._fresh))
            for round_number in range(self._samples.warm):
                progress(f"round {round_number + 1} of {self._samples.warm}")
                self._plain_warm.samples.append(ask_plainly(mos, self._plain_messages()))
                self._resident.samples.append(ask_cube(cube, next(self._fresh)))
                if round_number < self._samples.scratch:
                    scratch = ask_cube(cube, next(self._fresh), activation=False)
                    self._scratch.samples.append(scratch)
        for measurement in (self._scratch, self._plain_warm, self._resident):
            self._show_time(measurement)

    def measure_floods(self, mos: MOS, url: str) -> None:
        """Times right after other prompts have taken the whole KV pool."""
        cube, pool = mos.cube(CUBE_ID), read_pool(url)
        self._screen.line(
            f"The KV pool of this demo is small: {pool.num_blocks} blocks of {pool.block_size} "
            f"tokens, {pool.num_tokens:,} in all."
        )
        for number in range(1, self._samples.floods + 1):
            what = f"Flood {number} of {self._samples.floods}"
            with self._screen.working(what) as progress:
                sent = asyncio.run(flood(url, pool, seed=number, progress=progress))
            self._flooded.samples.append(ask_cube(cube, next(self._fresh)))
            self._plain_flooded.samples.append(ask_plainly(mos, self._plain_messages()))
            self._screen.line(f"{sent:,} tokens of other prompts have gone through the pool.")
            for measurement in (self._plain_flooded, self._flooded):
                self._show_sample(measurement.name, measurement.samples[-1])

    def measure_restart(self, mos: MOS) -> None:
        """The time of the first memory request that a new server gets."""
        sample = ask_cube(mos.cube(CUBE_ID), next(self._fresh))
        self._restarted.samples.append(sample)
        self._show_sample(self._restarted.name, sample)

    def _answer(self, mos: MOS, question: Question) -> str:
        return mos.chat(question.question, options=_ANSWER_OPTIONS).text

    def _show_answer(self, label: str, question: Question, answer: str) -> None:
        right = question.answered_by(answer)
        verdict = f'"{question.expected}" {"found" if right else "not found"}'
        self._screen.answer(label, answer, verdict=verdict, good=right)

    def _show_time(self, measurement: Measurement) -> None:
        samples = measurement.samples
        times = ", ".join(seconds_text(sample.seconds) for sample in samples)
        self._screen.line(
            f"{measurement.name:<34} {seconds_text(measurement.median_seconds):>8}  "
            f"(median of {len(samples)}: {times})"
        )

    def _show_sample(self, name: str, sample: Sample) -> None:
        source = "" if sample.source == "-" else f", source: {sample.source}"
        self._screen.line(
            f"{name:<34} {seconds_text(sample.seconds):>8}  "
            f"({sample.cached_tokens:,} tokens cached{source})"
        )

    def _plain_messages(self) -> list[Message]:
        """A fresh question with the handbook written into the system message by hand."""
        return compose_messages(
            [{"role": "user", "content": next(self._fresh)}],
            block=render_memory_block(None, self._sections),
            default_system=self._traits.default_system,
            placement=self._traits.placement,
        )


def _title_and_text(memory: MemoryInfo) -> tuple[str, str]:
    return str(memory.source.get("title") or ""), memory.text


def _fresh_questions(sections: Sequence[Section]) -> Iterator[str]:
    """Questions of like length, none of them asked twice."""
    for number, section in zip(itertools.count(1), itertools.cycle(sections), strict=False):
        yield f'Question {number}: what does the handbook say under "{section.title}"?'
