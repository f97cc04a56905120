"""The demo's parts that need no model: the pool's size, the screen, the lock, a failing server."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from memos_vllm.bench.flood import Pool, parse_pool
from memos_vllm.demo import run, stage
from memos_vllm.demo.screen import Screen, columns
from memos_vllm.demo.stage import locked_folder
from memos_vllm.errors import ConfigurationError, MemosError

METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:cache_config_info{block_size="128",engine="0",num_gpu_blocks="120",sliding_window="None"} 1.0
"""


def test_the_pool_is_read_from_the_metrics() -> None:
    assert parse_pool(METRICS) == Pool(num_blocks=120, block_size=128)
    assert parse_pool(METRICS).num_tokens == 15_360


@pytest.mark.parametrize("metrics", ["", METRICS.replace('"120"', '"None"')])
def test_metrics_without_a_pool_are_an_error(metrics: str) -> None:
    with pytest.raises(MemosError, match="KV pool"):
        parse_pool(metrics)


def test_columns_line_up() -> None:
    assert columns([("", "time"), ("from scratch", "2 s")]) == [
        "              time",
        "from scratch   2 s",
    ]


def test_away_from_a_terminal_lines_are_plain_whole_and_not_too_many() -> None:
    now = iter([0.0, 0.0, 1.0, 11.0, 11.0, 12.0])
    written = io.StringIO()
    screen = Screen(Console(file=written), clock=lambda: next(now))
    with screen.working("Flood") as progress:
        progress("early")
        progress("late")
    screen.line("x" * 200 + "\x1b[2J")

    assert written.getvalue().splitlines() == [
        "   Flood ...",
        "   Flood: late",
        "   Flood: 12.0 s",
        "   " + "x" * 200 + "\\x1b[2J",
    ]


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path),
        pytest.raises(ConfigurationError, match="another demo"),
        locked_folder(tmp_path),
    ):
        pass
    with locked_folder(tmp_path) as folder:
        assert folder == tmp_path


def test_a_server_that_ends_early_is_shown_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    dying = [sys.executable, "-c", "print('no room for the weights'); raise SystemExit(3)"]
    monkeypatch.setattr(stage, "memos_command", lambda *_: dying)
    monkeypatch.setattr(run, "prepare", lambda *_, **__: tmp_path)

    assert run.main(["--quick", "--data-dir", str(tmp_path / "demo")]) == 1
    said = capsys.readouterr().out
    assert "The demo failed: the server ended with exit code 3" in said
    assert said.count("no room for the weights") == 1
