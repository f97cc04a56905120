"""`memos-vllm bench simulate`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner, Result

from memos_vllm.bench.simulation import POLICIES
from memos_vllm.cli.bench_simulate import parse_size, simulate

app = typer.Typer()
app.command()(simulate)
QUICK = ("--cubes", "50", "--requests", "300")


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*QUICK, *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_every_policy_has_a_row_with_its_hits_savings_and_first_tokens() -> None:
    lines = run("--preset", "h100").stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(POLICIES)
    nothing = lines[-1].split("\t")
    assert nothing[1:5] == ["0.0%", "0.0%", "0.0%", "100.0%"]
    assert nothing[5] == "0 s (0.0%)"
    assert all(cell.endswith(" s") for cell in nothing[6:9])


def test_json_has_everything_that_the_result_came_from_and_is_the_same_again() -> None:
    arguments = ("--json", "--policy", "ours", "--tier", "pool=2GiB", "--seed", "7")
    first = run(*arguments)
    assert first.stdout == run(*arguments).stdout
    assert first.stderr == ""
    found = json.loads(first.stdout)
    assert found["workload"]["seed"] == 7
    assert found["machine"]["tiers"][0]["capacity_bytes"] == 2 << 30
    assert [result["policy"] for result in found["results"]] == ["ours"]
    assert found["results"][0]["requests"] == 300


def test_a_sweep_shows_the_sizes_that_it_tried() -> None:
    output = run("--sweep", "pool=1GiB,4GiB", "--sweep", "disk=1GB", "--policy", "lru")
    rows = [line.split("\t")[:3] for line in output.stdout.splitlines()]
    assert rows == [["1.0 GiB", "953.7 MiB", "lru"], ["4.0 GiB", "953.7 MiB", "lru"]]


def test_numbers_of_the_preset_can_be_set() -> None:
    output = run("--json", "--policy", "nothing", "--set", "prefill_tokens_per_second=1e6")
    found = json.loads(output.stdout)
    assert found["machine"]["prefill_tokens_per_second"] == 1e6
    assert found["results"][0]["ttft"]["p99"] < 0.2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("8GiB", 8 << 30), ("1.5 TiB", 3 << 39), ("40gb", 40 * 10**9), ("2kB", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "wrong",
    [
        ("--preset", "abacus"),
        ("--tier", "pool"),
        ("--tier", "pool=much"),
        ("--tier", "pool=-1GiB"),
        ("--sweep", "pool=1GiB,"),
        ("--set", "prefill_tokens_per_second=fast"),
    ],
)
def test_what_cannot_be_read_is_misuse(wrong: tuple[str, str]) -> None:
    run(*wrong, code=2)


@pytest.mark.parametrize("wrong", [("--policy", "magic"), ("--tier", "tape=1GiB"), ("--rate", "0")])
def test_what_is_not_there_is_one_sentence_and_exit_1(wrong: tuple[str, str]) -> None:
    from memos_vllm.cli.main import ReportingGroup

    reporting = typer.Typer(cls=ReportingGroup)
    reporting.command()(simulate)
    reporting.callback()(lambda: None)
    result = CliRunner().invoke(reporting, ["simulate", *QUICK, *wrong])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
