"""What a run measures once its servers run: the rounds, and the parts that follow them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from memos_vllm.bench.costs import control_plane, plain_traffic, preemptions, saving
from memos_vllm.bench.fleet import Fleet
from memos_vllm.bench.flood import read_pool
from memos_vllm.bench.measure import Rounds
from memos_vllm.bench.progress import Parts, Report, minutes, piece, reported
from memos_vllm.bench.prompts import Prompts
from memos_vllm.bench.record import Pair, Record, write_record
from memos_vllm.bench.situations import Server
from memos_vllm.bench.under_load import Library, load_runs, steady_runs
from memos_vllm.bench.verdicts import judge
from memos_vllm.errors import MemosError

# Enough for a 99th percentile.
_CONTROL_PLANE_CHATS = 200

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is given.

    Attributes:
        model: a prepared folder.
        output: the JSON file; written after every round.
        server_options: handed on to every server.
    """

    model: Path
    output: Path
    seed: int
    server_options: Sequence[str] = ()


class Measurement:
    """Fills a record, part by part.

    Args:
        fleet: started.
        note: is told what happens beside the rounds.
        report: is told the share done, of what follows the start.
    """

    def __init__(
        self,
        record: Record,
        settings: Settings,
        *,
        fleet: Fleet,
        rounds: Rounds,
        note: Note,
        report: Report,
    ) -> None:
        self._record = record
        self._settings = settings
        self._fleet = fleet
        self._rounds = rounds
        self._note = note
        self._report = report

    def measure(self) -> None:
        """All of it. What fails behind the rounds is noted as skipped, and the rest goes on.

        Raises:
            MemosError: a server that everything is compared with does not answer.
        """
        speed = self._prepare()
        expected = self._rounds.plan.parts(speed)
        self._note(f"what follows takes about {minutes(sum(expected.values()))}")
        parts = Parts(expected, self._report)
        self._measure_rounds(parts.report("rounds"))
        for part, measure in (
            ("answers", self._measure_answers),
            ("costs", self._measure_costs),
            ("load", self._measure_load),
            ("floods", self._measure_floods),
        ):
            if part in expected:
                try:
                    measure(parts.report(part))
                except (MemosError, httpx.HTTPError) as error:
                    self._skip(part, str(error))
                self._write()
        self._measure_footprints()

    def _prepare(self) -> float:
        """Bake the cubes.

        Returns:
            The prompt tokens that the machine computes a second.
        """
        self._rounds.warm_up(self._skip)
        speed = self._rounds.prefill_tokens_a_second()
        self._record.settings["prefill_tokens_a_second"] = round(speed)
        self._note(f"this machine computes {speed:,.0f} prompt tokens a second")
        for build in self._rounds.bake(self._skip):
            self._record.builds.append(build)
            self._note(
                f"{build.server}: {build.memory_tokens:,} tokens of memory baked in "
                f"{build.seconds:.2f} s, {build.size_bytes / 1e6:.1f} MB"
            )
        return speed

    def _measure_rounds(self, report: Report) -> None:
        for sample in self._rounds.run(report):
            self._record.samples.append(sample)
            if len(self._record.samples) % len(self._rounds.plan.situations) == 0:
                self._write()

    def _measure_answers(self, report: Report) -> None:
        plan = self._rounds.plan
        for number, tokens in enumerate(plan.memory_tokens):
            self._record.verdicts += reported(
                judge(self._fleet, plan, self._rounds, memory_tokens=tokens),
                expected=len(plan.compared),
                report=piece(report, number, len(plan.memory_tokens)),
                message=f"comparing answers with plain vLLM's, {tokens:,} tokens of memory",
            )

    def _measure_costs(self, report: Report) -> None:
        fleet, prompts = self._fleet, self._prompts(1)
        count, longest = self._rounds.plan.rounds, max(self._rounds.plan.memory_tokens)
        by_cube = control_plane(
            fleet,
            prompts,
            self._rounds.memories[longest],
            memory_tokens=longest,
            chats=_CONTROL_PLANE_CHATS,
        )
        measured: tuple[tuple[str, int, Iterable[Pair]], ...] = (
            (
                "plain chats with the plugin and without",
                4 * count,
                plain_traffic(fleet, prompts, rounds=2 * count),
            ),
            (
                "chats that name a cube, and such that bring the same prompt",
                _CONTROL_PLANE_CHATS,
                by_cube,
            ),
            (
                "chats that keep what they compute",
                2 * count,
                saving(fleet, prompts, memory_tokens=longest, rounds=count),
            ),
            (
                "plain chats that need more than the pool has",
                1,
                preemptions(fleet, seed=self._settings.seed),
            ),
        )
        for number, (what, expected, pairs) in enumerate(measured):
            self._record.pairs += reported(
                pairs, expected=expected, report=piece(report, number, len(measured)), message=what
            )

    def _measure_load(self, report: Report) -> None:
        library = Library(self._prompts(2))
        report(0.0, f"load: baking {len(library.memories)} cubes")
        self._fleet.client(Server.MEMOS)
        library.fill(self._fleet.url(Server.MEMOS))
        self._record.load += load_runs(
            self._fleet,
            library,
            tokenizer=self._settings.model,
            prefill_tokens_a_second=self._record.settings["prefill_tokens_a_second"],
            seed=self._settings.seed,
            report=report,
        )

    def _measure_floods(self, report: Report) -> None:
        longest = max(self._rounds.plan.memory_tokens)
        self._record.steady += steady_runs(
            self._fleet,
            self._prompts(3),
            self._rounds.memories[longest],
            memory_tokens=longest,
            seed=self._settings.seed,
            report=report,
        )

    def _measure_footprints(self) -> None:
        for server in self._rounds.plan.servers:
            with contextlib.suppress(MemosError):
                self._fleet.client(server)
                pool = read_pool(self._fleet.url(server))
                pool_bytes = round(pool.num_tokens * self._kv_bytes_a_token())
                self._record.footprints.append(self._fleet.footprint(server, pool_bytes=pool_bytes))

    def _kv_bytes_a_token(self) -> float:
        """From the exact artifacts: they hold the KV of whole blocks as the pool does."""
        block = int(self._record.settings["block_tokens"])
        for build in self._record.builds:
            if build.server == Server.MEMOS:
                return build.size_bytes / (build.memory_tokens // block * block)
        return 0.0

    def _prompts(self, stream: int) -> Prompts:
        """Other texts than those of the rounds."""
        return Prompts(self._settings.model, seed=self._settings.seed + stream)

    def _skip(self, what: str, reason: str) -> None:
        self._record.skipped[what] = reason
        self._note(f"skipped: {what}: {reason}")

    def _write(self) -> None:
        write_record(self._record, self._settings.output)
