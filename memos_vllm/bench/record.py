"""What a run leaves behind: one JSON file with every raw sample, from which reports are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from memos_vllm.errors import ConfigurationError, MemosError

FORMAT = 1


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One point of the grid: how long the memory is and how long what is asked, in tokens."""

    memory_tokens: int
    query_tokens: int

    def __str__(self) -> str:
        return f"{self.memory_tokens:,} + {self.query_tokens}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One streamed chat.

    Attributes:
        round: samples of one round belong together: ratios are taken within it.
        order: the place that chance gave it within the round.
        ttft_seconds: from sending the request to the first chunk with text.
        cached_tokens: prompt tokens that were not computed, as the server counted them.
        source: what the connector says it did; "" for a chat without memory.
        fault: why the sample does not show what its row claims; "" when it does.
    """

    cell: Cell
    situation: str
    round: int
    order: int
    ttft_seconds: float
    total_seconds: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    source: str = ""
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Build:
    """One bake: a cube's memory computed and kept.

    Attributes:
        seconds: until the artifact was in the store, as the client that waited saw it.
        size_bytes: of the artifact, on disk.
    """

    server: str
    memory_tokens: int
    seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a situation's answers may count, by the yardstick of the exactness tests.

    Attributes:
        differing: prompts whose greedy answers part from plain vLLM's.
        gap: the largest distance between the two likeliest tokens where they part, in nats.
        noise: the same of plain vLLM against itself, in words.
        fault: why not; "" when they count.
    """

    situation: str
    memory_tokens: int
    prompts: int
    differing: int
    gap: float
    shift: float
    noise: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one server with all its processes, in bytes.

    Attributes:
        peak_bytes: the sum of each process's largest resident size; what they share counts in each.
        proportional_bytes: at the end, what they share counted once.
        pool_bytes: the KV pool in it.
    """

    server: str
    peak_bytes: int
    proportional_bytes: int
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two numbers that were taken one after the other, and what they are."""

    name: str
    base: str
    unit: str
    value: float
    base_value: float


@dataclass(slots=True)
class Record:
    """A whole run.

    Attributes:
        machine: processor, cores, memory, versions, commit.
        settings: of the run: model, pool, rounds, seed, options of the servers.
        skipped: what was not measured, and why.
        pairs: the plugin's cost on plain traffic, and of saving.
        load: results under concurrency, as `bench.load` writes them.
        complete: false while it runs, and for ever if it was interrupted.
    """

    started_at: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    builds: list[Build] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    load: list[dict[str, Any]] = field(default_factory=list)
    steady: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = False
    format: int = FORMAT


class RecordUnreadable(MemosError):
    """A file is not a record of this benchmark, or of a later version of it."""


_RECORD = TypeAdapter(Record)


def write_record(record: Record, path: Path) -> None:
    """Replace the file at once, so that an interrupted run leaves the rounds before it."""
    try:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(_RECORD.dump_json(record, indent=1))
        partial.replace(path)
    except OSError as error:
        raise ConfigurationError(f"the record cannot be written: {error}") from error


def read_record(path: Path) -> Record:
    """Read a record back.

    Raises:
        RecordUnreadable: with what is wrong with it.
    """
    try:
        record = _RECORD.validate_json(path.read_bytes())
    except OSError as error:
        raise RecordUnreadable(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RecordUnreadable(
            f"{path} is no record of `memos-vllm bench ttft`: {where}: {first['msg']}"
        ) from error
    if record.format > FORMAT:
        raise RecordUnreadable(
            f"{path} is of format {record.format}, this version reads {FORMAT}; update memos-vllm"
        )
    return record
