"""What a run of the benchmark does when something fails on its way."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from bench_kit import record_of
from typer.testing import CliRunner

from memos_vllm.bench import ttft
from memos_vllm.bench.fleet import Fleet, drop_page_cache
from memos_vllm.bench.measurement import Measurement, Settings
from memos_vllm.bench.plan import make_plan
from memos_vllm.bench.record import Pair, read_record, write_record
from memos_vllm.bench.situations import Answers, Server
from memos_vllm.bench.streams import ChatFailed, timed_chat
from memos_vllm.bench.verdicts import fault_of_answers
from memos_vllm.bench.yardstick import Comparison, Difference
from memos_vllm.cli.bench import app
from memos_vllm.errors import ConfigurationError
from memos_vllm.interrupts import ending_as_interrupt, undisturbed
from memos_vllm.process import ServerFailed


class StandIn:
    """A server that starts only when it may."""

    url = "http://127.0.0.1:9"

    def __init__(self) -> None:
        self.starts = 0
        self.refusals: list[str] = []

    def start(self, *, timeout_seconds: float) -> object:
        self.starts += 1
        if self.refusals:
            raise ServerFailed(self.refusals.pop())
        return self

    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def pids(self) -> list[int]:
        return []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield


def compared(*gaps: float, prompts: int = 6, shift: float = 0.5) -> Comparison:
    differences = tuple(Difference(prompt=0, position=0, gap_a=gap, gap_b=0.0) for gap in gaps)
    return Comparison(num_prompts=prompts, differences=differences, shift=shift)


def test_a_chat_with_a_server_that_is_not_there_has_failed() -> None:
    client = httpx.Client(base_url="http://127.0.0.1:9", trust_env=False)
    with client, pytest.raises(ChatFailed, match="no answer: ConnectError"):
        timed_chat(client, [], model="m")


def test_a_server_that_did_not_come_back_is_started_again_when_it_is_asked() -> None:
    server = StandIn()
    fleet = Fleet({Server.MEMOS: server})
    fleet.start(Server.MEMOS)
    server.refusals = ["no memory", "no memory"]
    with pytest.raises(ServerFailed):
        fleet.restart(Server.MEMOS)
    with pytest.raises(ServerFailed):
        fleet.client(Server.MEMOS)
    fleet.client(Server.MEMOS)
    assert server.starts == 4
    fleet.stop()


def test_dropping_pages_passes_over_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "there").write_bytes(b"kv")
    drop_page_cache(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_process_ends_a_run_as_ctrl_c_does(number: signal.Signals) -> None:
    with ending_as_interrupt(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_nothing_ends_it_while_servers_are_stopped() -> None:
    with undisturbed():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)


def test_a_finished_run_of_the_same_name_is_put_aside(tmp_path: Path) -> None:
    output, said = tmp_path / "new" / "ttft.json", list[str]()
    ttft._make_room(output, said.append)
    write_record(record_of({"direct": [1.0]}), output)
    ttft._make_room(output, said.append)
    assert not output.exists()
    assert read_record(tmp_path / "new" / "ttft-before.json").samples
    assert "ttft-before.json" in said[0]


def test_a_folder_that_cannot_be_made_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        ttft._make_room(tmp_path / "file" / "ttft.json", lambda _: None)


def test_answers_may_part_where_plain_vllm_is_as_unsure_as_with_itself() -> None:
    noise = compared(0.1, prompts=36, shift=0.5)
    assert fault_of_answers(Answers.EXACT, compared(0.4), noise) == ""
    assert "0.6 nats, at most 0.5" in fault_of_answers(Answers.EXACT, compared(0.6), noise)
    assert fault_of_answers(Answers.INT8, compared(0.6), noise) == ""


def test_one_near_tie_is_noise_also_where_plain_vllm_happened_to_agree_with_itself() -> None:
    noise = compared(prompts=36, shift=0.25)
    assert fault_of_answers(Answers.EXACT, compared(0.03), noise) == ""
    many = compared(*[0.03] * 6)
    assert "6 of 6 answers differ" in fault_of_answers(Answers.EXACT, many, noise)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typer.Typer:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 8192}')
    monkeypatch.setattr("memos_vllm.models.prepare.prepare", lambda _name, *, progress: tmp_path)
    return app


@pytest.mark.parametrize("before", [(), ("some/model",)])
def test_what_follows_two_dashes_is_for_the_servers(
    commands: typer.Typer, before: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(ttft, "run", lambda _plan, settings, **_: given.append(settings))
    CliRunner().invoke(commands, ["ttft", *before, "--quick", "--", "--dtype", "float32"])
    assert given[0].server_options[-2:] == ["--dtype", "float32"]


def test_an_option_with_a_typing_error_is_misuse(commands: typer.Typer) -> None:
    result = CliRunner().invoke(commands, ["ttft", "--qiuck", "--dry-run"])
    assert result.exit_code == 2
    assert "--qiuck" in result.output


class NoRounds:
    """Rounds of no samples, on servers that do not come up."""

    plan = make_plan(quick=False, max_model_len=8192, block_tokens=128, memory=[512], probes=False)

    def warm_up(self, skip: object) -> None: ...
    def prefill_tokens_a_second(self) -> float:
        return 1000.0

    def bake(self, skip: object) -> Iterator[object]:
        return iter(())

    def run(self, report: object) -> Iterator[object]:
        return iter(())


def test_a_part_that_fails_is_skipped_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair("plain chat", "plain vLLM", "s", 1.0, 1.0)
    measured = {"_measure_load": ["load"], "_measure_floods": ["floods"]}

    def costs(self: Measurement, report: object) -> None:
        self._record.pairs.append(pair)
        raise ServerFailed("no memory")

    monkeypatch.setattr(Measurement, "_measure_costs", costs)
    for name, ran in measured.items():
        monkeypatch.setattr(Measurement, name, lambda self, report, ran=ran: ran.append("ran"))
    monkeypatch.setattr(Measurement, "_measure_footprints", lambda self: None)
    record, output = record_of({"direct": [1.0]}), tmp_path / "ttft.json"
    Measurement(
        record,
        Settings(tmp_path, output, seed=1),
        fleet=Fleet({}),
        rounds=NoRounds(),  # type: ignore[arg-type]
        note=lambda _: None,
        report=lambda _share, _message: None,
    ).measure()
    assert record.skipped == {"costs": "no memory"}
    assert read_record(output).pairs == [pair]
    assert all(ran[-1] == "ran" for ran in measured.values())
