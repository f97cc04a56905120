"""One run of `memos-vllm bench ttft`, from the model's folder to the finished record."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from memos_vllm.bench.costs import control_plane, plain_traffic, preemptions, saving
from memos_vllm.bench.fleet import Fleet, Startable, our_servers, server_environment, server_options
from memos_vllm.bench.flood import read_pool
from memos_vllm.bench.machine import describe_machine
from memos_vllm.bench.measure import REQUIRED, Report, Rounds
from memos_vllm.bench.peers import ready_peers
from memos_vllm.bench.plan import Plan
from memos_vllm.bench.prompts import Prompts
from memos_vllm.bench.record import Record, read_record, write_record
from memos_vllm.bench.situations import Server
from memos_vllm.bench.under_load import Library, load_runs, steady_runs
from memos_vllm.bench.verdicts import judge
from memos_vllm.errors import ConfigurationError, MemosError
from memos_vllm.interrupts import ending_as_interrupt
from memos_vllm.process import ServerFailed

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


def max_model_len(model: Path) -> int:
    """The longest prompt and answer that the model was made for, in tokens.

    Raises:
        ConfigurationError: its config.json does not say.
    """
    try:
        config = json.loads((model / "config.json").read_text())
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{model / 'config.json'} does not say how long prompts may be ({error}); name the "
            "length with --max-model-len"
        ) from error


def run(plan: Plan, settings: Settings, *, note: Note, report: Report) -> Record:
    """Measure a plan on real servers, and write the record.

    An interrupted run leaves what it has measured, marked as incomplete.

    Args:
        note: is told what happens beside the rounds.
        report: is told the share done.
    """
    started = time.monotonic()
    _make_room(settings.output, note)
    record = Record(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        settings={
            "model": settings.model.name,
            "seed": settings.seed,
            "rounds": plan.rounds,
            "block_tokens": plan.block_tokens,
            "pool_blocks": plan.pool_blocks,
            "max_model_len": plan.max_model_len,
            "server_options": list(settings.server_options),
        },
    )
    # What cannot be written is found now.
    write_record(record, settings.output)
    with tempfile.TemporaryDirectory(prefix="memos-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        servers = _servers(folder, plan, settings, record, note=note)
        for server in record.skipped:
            plan = plan.without(Server(server))
        with (
            ending_as_interrupt(),
            _started(servers, plan, record, note=note) as (fleet, startable),
        ):
            prompts = Prompts(settings.model, seed=settings.seed)
            rounds = Rounds(fleet, startable, prompts, folder=folder, seed=settings.seed)
            try:
                _measure(record, fleet, rounds, settings, note=note, report=report)
                record.complete = True
            finally:
                record.seconds = time.monotonic() - started
                write_record(record, settings.output)
    return record


def _make_room(output: Path, note: Note) -> None:
    """Make the record's folder, and put a finished run that has its name aside."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"the record cannot be written: {error}") from error
    with contextlib.suppress(MemosError):
        if read_record(output).complete:
            aside = output.with_name(f"{output.stem}-before{output.suffix}")
            output.replace(aside)
            note(f"{output} holds a finished run, which is {aside} from now on")


def _measure(
    record: Record,
    fleet: Fleet,
    rounds: Rounds,
    settings: Settings,
    *,
    note: Note,
    report: Report,
) -> None:

    def skip(server: Server, reason: str) -> None:
        record.skipped[server] = reason
        note(f"skipped: {server}: {reason}")

    rounds.warm_up(skip)
    speed = rounds.prefill_tokens_a_second()
    record.settings["prefill_tokens_a_second"] = round(speed)
    note(f"this machine computes {speed:,.0f} prompt tokens a second")
    for build in rounds.bake(skip):
        record.builds.append(build)
        note(
            f"{build.server}: {build.memory_tokens:,} tokens of memory baked in "
            f"{build.seconds:.2f} s, {build.size_bytes / 1e6:.1f} MB"
        )
    plan = rounds.plan
    note(f"what follows takes about {minutes(plan.seconds(speed))}")
    for sample in rounds.run(report):
        record.samples.append(sample)
        if len(record.samples) % len(plan.situations) == 0:
            write_record(record, settings.output)
    if plan.probes:
        for tokens in plan.memory_tokens:
            note(f"comparing answers with plain vLLM's, {tokens:,} tokens of memory")
            record.verdicts += judge(fleet, plan, rounds, memory_tokens=tokens)
    if plan.costs:
        _costs(record, fleet, plan, rounds, settings, note=note)
    if plan.load:
        _load(record, fleet, plan, rounds, settings, note=note)
    _footprints(fleet, plan, record)


def _load(
    record: Record, fleet: Fleet, plan: Plan, rounds: Rounds, settings: Settings, *, note: Note
) -> None:
    prompts = Prompts(settings.model, seed=settings.seed + 2)
    library = Library(prompts)
    note(f"load: baking {len(library.memories)} cubes")
    fleet.client(Server.MEMOS)
    library.fill(fleet.url(Server.MEMOS))
    record.load += load_runs(
        fleet,
        library,
        tokenizer=settings.model,
        prefill_tokens_a_second=record.settings["prefill_tokens_a_second"],
        seed=settings.seed,
        note=note,
    )
    longest = max(plan.memory_tokens)
    record.steady += steady_runs(
        fleet,
        prompts,
        rounds.memories[longest],
        memory_tokens=longest,
        seed=settings.seed,
        note=note,
    )
    write_record(record, settings.output)


def _costs(
    record: Record, fleet: Fleet, plan: Plan, rounds: Rounds, settings: Settings, *, note: Note
) -> None:
    prompts = Prompts(settings.model, seed=settings.seed + 1)
    longest = max(plan.memory_tokens)
    note("plain chats with the plugin and without")
    record.pairs += plain_traffic(fleet, prompts, rounds=2 * plan.rounds)
    note("chats that name a cube, and such that bring the same prompt")
    record.pairs += control_plane(
        fleet,
        prompts,
        rounds.memories[longest],
        memory_tokens=longest,
        chats=_CONTROL_PLANE_CHATS,
    )
    note("chats that keep what they compute")
    record.pairs += saving(fleet, prompts, memory_tokens=longest, rounds=plan.rounds)
    note("plain chats that need more than the pool has")
    record.pairs.append(preemptions(fleet, seed=settings.seed))
    write_record(record, settings.output)


def minutes(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _servers(
    folder: Path, plan: Plan, settings: Settings, record: Record, *, note: Note
) -> dict[Server, Startable]:
    """Those of the plan that can be started here; why the others cannot goes into the record."""
    options = server_options(
        pool_blocks=plan.pool_blocks,
        max_model_len=plan.max_model_len,
        extra=settings.server_options,
    )
    model = str(settings.model)
    found = our_servers(folder, model, options)
    peers, skipped = ready_peers(
        [server for server in plan.servers if server not in found],
        model=model,
        options=options,
        environment=server_environment(),
        folder=folder,
        report=note,
    )
    record.skipped |= skipped
    found |= {Server(name): peer for name, peer in peers.items()}
    return {server: found[server] for server in plan.servers if server in found}


@contextlib.contextmanager
def _started(
    servers: dict[Server, Startable], plan: Plan, record: Record, *, note: Note
) -> Iterator[tuple[Fleet, Plan]]:
    """All servers, one after the other; what does not start is skipped, plain vLLM excepted."""
    fleet = Fleet(servers)
    try:
        for server in plan.servers:
            note(f"starting {server}")
            try:
                fleet.start(server)
            except ServerFailed as error:
                if server in REQUIRED:
                    raise
                record.skipped[server] = str(error)
                plan = plan.without(server)
        for name, reason in record.skipped.items():
            note(f"skipped: {name}: {reason}")
        yield fleet, plan
    finally:
        fleet.stop()


def _footprints(fleet: Fleet, plan: Plan, record: Record) -> None:
    for server in plan.servers:
        with contextlib.suppress(MemosError):
            pool = read_pool(str(fleet.client(server).base_url).rstrip("/"))
            per_token = _kv_bytes_a_token(record)
            pool_bytes = round(pool.num_tokens * per_token)
            record.footprints.append(fleet.footprint(server, pool_bytes=pool_bytes))


def _kv_bytes_a_token(record: Record) -> float:
    """From the exact artifacts: they hold the KV of whole blocks as the pool does."""
    block = int(record.settings["block_tokens"])
    for build in record.builds:
        if build.server == Server.MEMOS:
            return build.size_bytes / (build.memory_tokens // block * block)
    return 0.0
