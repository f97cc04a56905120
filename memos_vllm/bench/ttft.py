"""One run of `memos-vllm bench ttft`, from the model's folder to the finished record."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from memos_vllm.bench.fleet import Fleet, Startable, our_servers, server_environment, server_options
from memos_vllm.bench.machine import describe_machine
from memos_vllm.bench.measure import REQUIRED, Rounds
from memos_vllm.bench.measurement import Measurement, Note, Settings
from memos_vllm.bench.peers import ready_peers
from memos_vllm.bench.plan import Plan
from memos_vllm.bench.progress import Report
from memos_vllm.bench.prompts import Prompts
from memos_vllm.bench.record import Record, read_record, write_record
from memos_vllm.bench.situations import Server
from memos_vllm.errors import ConfigurationError, MemosError
from memos_vllm.interrupts import ending_as_interrupt
from memos_vllm.process import ServerFailed


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
            measurement = Measurement(
                record, settings, fleet=fleet, rounds=rounds, note=note, report=report
            )
            try:
                measurement.measure()
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
