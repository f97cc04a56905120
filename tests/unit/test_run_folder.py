"""A data folder has one server at a time, and nothing of one that was killed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memos_vllm.config import RUN_VARIABLE, ServerSettings
from memos_vllm.engine import run_folder
from memos_vllm.engine.run_folder import Address, RunFolder, wait_for_address
from memos_vllm.engine.supervisor import namespace_of
from memos_vllm.errors import ConfigurationError, Unavailable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.2)
    return tmp_path / "run"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of nobody's run."""
    with _sleep({}) as child:
        yield child
        child.kill()


def _sleep(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    code = "print(flush=True); import time; time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_a_second_server_is_told_which_process_has_the_folder(folder: Path) -> None:
    first = RunFolder(folder)
    with pytest.raises(Unavailable, match=f"pid {os.getpid()}"):
        RunFolder(folder)
    first.close()
    RunFolder(folder).close()


def test_what_a_killed_run_left_is_ended_and_nothing_else(
    folder: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    killed = RunFolder(folder)
    with _sleep({RUN_VARIABLE: killed.run}) as left:
        killed._lock.release()  # the kernel does when the supervisor is killed
        following = RunFolder(folder)
        assert left.wait(10) < 0
    assert not killed.ray_folder.exists()
    assert sleeper.poll() is None
    following.close()


def test_what_still_runs_when_a_run_ends_is_ended(folder: Path) -> None:
    run = RunFolder(folder)
    with _sleep({RUN_VARIABLE: run.run}) as left:
        run.close()
        assert left.wait(10) < 0
    assert not run.ray_folder.exists()
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.parametrize("content", ["", "{", '{"run": 1}', "[]"])
def test_a_note_that_is_not_whole_does_not_keep_a_server_from_starting(
    folder: Path, content: str
) -> None:
    folder.mkdir()
    (folder / "run.json").write_text(content)
    RunFolder(folder).close()


def test_a_note_names_no_folder_of_anyone_elses_to_remove(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"run": "x", "ray_folder": str(precious), "server": 0})
    )
    RunFolder(folder).close()
    assert precious.exists()


def test_servers_find_the_actors_of_their_own_run_only(folder: Path) -> None:
    run = RunFolder(folder)
    run.publish(Address(run.run, "127.0.0.1:1", "memos"))
    assert wait_for_address(folder, run.run, seconds=1).ray == "127.0.0.1:1"
    assert stat.S_IMODE((folder / "control.json").stat().st_mode) == 0o600
    with pytest.raises(ConfigurationError, match="did not start"):
        wait_for_address(folder, "another", seconds=0.1)
    run.close()


def test_servers_of_different_catalogs_share_no_actors_in_a_cluster() -> None:
    def named(**fields: object) -> str:
        return namespace_of(ServerSettings.model_validate({"data_dir": "/x", **fields}))

    url = "postgresql://u:secret@db/memos"
    assert named(catalog_url=url) == named(catalog_url=url, artifact_budget_gib=1)
    assert "secret" not in named(catalog_url=url)
    others = [named(), named(data_dir="/y"), named(catalog_url=url), named(embedder="none")]
    assert len(set(others)) == len(others)
