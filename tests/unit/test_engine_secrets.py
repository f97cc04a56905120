"""The key files: made once, for the owner alone, the same for every process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from memos_vllm.engine.secrets import (
    KEY_BYTES,
    artifact_scope,
    cache_salt,
    load_keys,
)
from memos_vllm.errors import ConfigurationError

NAMES = ["artifact.key", "salt.key", "ticket.key", "tombstone.key"]
_PRINT_KEYS = """
import hashlib, sys
from pathlib import Path
from memos_vllm.engine.secrets import load_keys
sys.stdin.readline()
keys = load_keys(Path(sys.argv[1]))
print(hashlib.sha256(keys.ticket + keys.salt + keys.artifact + keys.tombstone).hexdigest())
"""


def test_keys_are_made_once_with_mode_0600_in_a_folder_of_mode_0700(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "secrets"
    previous = os.umask(0)
    try:
        keys = load_keys(folder)
    finally:
        os.umask(previous)
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    values = {keys.ticket, keys.salt, keys.artifact, keys.tombstone}
    assert len(values) == 4
    assert {len(value) for value in values} == {KEY_BYTES}
    assert load_keys(folder) == keys


def test_processes_that_race_get_one_key(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _PRINT_KEYS, str(tmp_path / "secrets")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    digests = {racer.communicate(timeout=60)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * 4
    assert len(digests) == 1
    assert sorted(path.name for path in (tmp_path / "secrets").iterdir()) == NAMES


def test_the_loser_of_a_race_uses_the_winners_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process found no file: each makes one, and the first to link wins."""
    winner = load_keys(tmp_path)
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix != ".key" and real(path))
    assert load_keys(tmp_path) == winner


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o666, 0o601])
def test_a_key_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    load_keys(tmp_path)
    (tmp_path / "salt.key").chmod(mode)
    with pytest.raises(ConfigurationError, match=r"salt\.key.*chmod 600"):
        load_keys(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(31), bytes(33)])
def test_a_key_of_the_wrong_size_is_refused(tmp_path: Path, content: bytes) -> None:
    load_keys(tmp_path)
    (tmp_path / "ticket.key").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"{len(content)} bytes"):
        load_keys(tmp_path)


def test_keys_are_never_printed(tmp_path: Path) -> None:
    keys = load_keys(tmp_path)
    shown = repr(keys) + str(keys)
    assert all(str(value) not in shown for value in (keys.ticket, keys.salt, keys.artifact))


def test_salts_differ_by_order_epoch_labels_and_boundaries() -> None:
    key = bytes(32)
    cubes = [
        [("a", 1)],
        [("a", 2)],
        [("a", 11)],
        [("b", 1)],
        [("a", 1), ("b", 1)],
        [("b", 1), ("a", 1)],
        [("ab", 1)],
        [("a1", 1)],
    ]
    salts = [cache_salt(key, cube) for cube in cubes]
    salts += [cache_salt(key, [("a", 1)], ("x",)), cache_salt(key, [("a", 1)], ("x", "y"))]
    salts += [cache_salt(bytes([1]) * 32, [("a", 1)]), artifact_scope(key, [("a", 1)])]
    assert len(set(salts)) == len(salts)
    assert cache_salt(key, [("a", 1)], ("y", "x")) == cache_salt(key, [("a", 1)], ("x", "y"))


def test_a_label_cannot_pass_for_a_cube() -> None:
    key = bytes(32)
    assert cache_salt(key, [("a", 1), ("labels", 2)]) != cache_salt(key, [("a", 1)], ("2",))
    # Cube ids are checked at the edge, yet the derivation must not depend on that.
    assert cache_salt(key, [("a", 1)], ("x",)) != cache_salt(key, [("a", 1)], ("", "x"))
