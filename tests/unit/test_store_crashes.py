"""Killed, out of disk, and side by side: whole or absent, and nobody else's loss."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from store_samples import IDENTITY, LAYOUT, files_of, kv_of, open_store, save, token_ids

from memos_vllm.activation.store import (
    ArtifactSaveFailed,
    ArtifactStoreFull,
    artifact_store,
    durable,
)
from memos_vllm.errors import ArtifactError

# Every call through which the store changes the disk.
CALLS = ("open", "pwrite", "posix_fallocate", "fchmod", "fsync", "rename")


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


class Saboteur:
    """Stands in for `os` in the store's writing code and does harm at the n-th call."""

    def __init__(self, at: int, harm: Callable[[], None]) -> None:
        self.at, self.harm, self.calls = at, harm, 0

    def __getattr__(self, name: str) -> object:
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*args: object, **options: object) -> object:
            self.calls += 1
            if self.calls == self.at:
                self.harm()
            return function(*args, **options)

        return call


def save_one(root: Path) -> None:
    save(open_store(root), token_ids(100))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_whole(root: Path, *, seeds: set[int | None]) -> None:
    """After a scan: the artifact is one of `seeds` bit for bit (None: absent); no litter."""
    store = open_store(root, orphan_age_seconds=-1)
    report = store.scan()
    assert report.quarantined == ()
    match = store.lookup(IDENTITY, token_ids(100))
    if match is None:
        assert None in seeds
        assert files_of(root) == set()
        return
    with store.open_shards(match.manifest) as reader:
        read = np.stack([reader.layer(layer, num_tokens=100) for layer in range(2)])
    stored = [
        s for s in seeds if s is not None and np.array_equal(read, kv_of(2, 100, 2, 8, seed=s))
    ]
    assert stored
    assert len(files_of(root)) == 2


def number_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    counter = Saboteur(-1, kill_self)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "os", counter)
        save(open_store(tmp_path / "count"), token_ids(100))
    return counter.calls


def test_a_kill_at_any_call_of_a_first_save_leaves_the_whole_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = number_of_calls(tmp_path, monkeypatch)
    assert total > 15
    for at in range(1, total + 1):
        root = tmp_path / str(at)
        monkeypatch.setattr(durable, "os", saboteur := Saboteur(at, kill_self))
        status = in_child(partial(save_one, root))
        monkeypatch.setattr(durable, "os", os)
        assert os.WIFSIGNALED(status), saboteur.at
        check_whole(root, seeds={None, 0})


def test_a_kill_at_any_call_of_a_second_save_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(open_store(tmp_path), token_ids(100))
    at, finished = 0, False
    while not finished:
        at += 1
        monkeypatch.setattr(durable, "os", Saboteur(at, kill_self))

        def replace() -> None:
            store = open_store(tmp_path)
            store.scan()
            save(store, token_ids(100), seed=1)

        finished = not os.WIFSIGNALED(in_child(replace))
        monkeypatch.setattr(durable, "os", os)
        check_whole(tmp_path, seeds={0, 1})
        save(open_store(tmp_path), token_ids(100))
    assert at > 15


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_while_deleting_leaves_no_manifest_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    manifest = save(open_store(tmp_path), token_ids(100))
    unlink, calls = Path.unlink, iter(range(1, 100))

    def unlink_or_die(path: Path, missing_ok: bool = False) -> None:
        if next(calls) == at:
            kill_self()
        unlink(path, missing_ok=missing_ok)

    def discard() -> None:
        monkeypatch.setattr(Path, "unlink", unlink_or_die)
        open_store(tmp_path).discard(manifest.key, "test")

    assert os.WIFSIGNALED(in_child(discard))
    check_whole(tmp_path, seeds={0} if at == 1 else {None})


def test_a_failed_second_save_of_the_same_bytes_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, token_ids(100))

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(artifact_store, "write_file", refuse)
        with pytest.raises(ArtifactStoreFull):
            save(store, token_ids(100))
    check_whole(tmp_path, seeds={0})


def test_kills_at_random_times_never_leave_anything_torn(tmp_path: Path) -> None:
    dice = random.Random(1)

    def save_for_ever() -> None:
        store = open_store(tmp_path, budget_bytes=200_000)
        store.scan()
        for seed in range(1_000_000):
            save(store, token_ids(100 + seed % 7, seed=seed % 5), seed=seed)

    saved = 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        store = open_store(tmp_path, orphan_age_seconds=-1, budget_bytes=200_000)
        report = store.scan()
        assert report.quarantined == ()
        assert store.bytes_used <= 200_000
        assert len(files_of(tmp_path)) == 2 * store.num_artifacts
        for seed in range(5):
            for length in range(100, 107):
                match = store.lookup(IDENTITY, token_ids(length, seed=seed))
                if match is not None:
                    with store.open_shards(match.manifest) as reader:
                        reader.verify(match.num_tokens)
        saved += store.num_artifacts
    assert saved > 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, ArtifactStoreFull),
        (errno.EDQUOT, ArtifactStoreFull),
        (errno.EIO, ArtifactSaveFailed),
        (errno.EROFS, ArtifactSaveFailed),
    ],
)
def test_an_error_at_any_call_is_typed_and_costs_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    expected: type[ArtifactError],
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    store = open_store(tmp_path)
    save(store, token_ids(100))
    save(store, token_ids(100, seed=1), seed=1)
    before = files_of(tmp_path)
    ids, at, finished = token_ids(100, seed=2), 0, False
    while not finished:
        at += 1
        monkeypatch.setattr(durable, "os", Saboteur(at, fail))
        met: type[Exception] | None = None
        try:
            save(store, ids, seed=2)
        except ArtifactError as error:
            met = type(error)
        finished = met is None
        assert met in {expected, None}
        monkeypatch.setattr(durable, "os", os)
        if not finished:
            assert files_of(tmp_path) == before
            assert not store.contains(IDENTITY, ids)
            assert open_store(tmp_path).scan().num_artifacts == 2
    assert at > 15
    assert store.num_artifacts == 3


def test_a_filesystem_without_preallocation_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    save(open_store(tmp_path), token_ids(100))
    check_whole(tmp_path, seeds={0})


def test_a_real_size_limit_is_a_full_store(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            open_store(tmp_path).begin_shard(IDENTITY, token_ids(1000), LAYOUT)
        except ArtifactStoreFull:
            os._exit(42)

    assert os.waitstatus_to_exitcode(in_child(limited)) == 42
    assert files_of(tmp_path) == set()


def test_a_commit_waits_while_another_process_changes_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with store._lock.held():
        child = os.fork()
        if child == 0:
            try:
                save_one(tmp_path)
            finally:
                os._exit(0)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert not list((tmp_path / "store" / "manifests").iterdir())
    assert os.waitpid(child, 0) == (child, 0)
    check_whole(tmp_path, seeds={0})


def test_two_processes_save_read_and_evict_side_by_side(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from store_samples import IDENTITY, open_store, save, token_ids
from memos_vllm.errors import ArtifactMissing
store = open_store(Path(sys.argv[1]), budget_bytes=150_000)
store.scan()
read = gone = 0
for turn in range(60):
    try:
        save(store, token_ids(100, seed=turn % 9), seed=turn % 9)
    except ArtifactMissing:
        gone += 1  # the other process evicted the very same bytes: documented at `commit`
    match = store.lookup(IDENTITY, token_ids(100, seed=(turn * 5) % 9))
    if match:
        try:
            with store.open_shards(match.manifest) as reader:
                reader.verify(match.num_tokens)
            read += 1
        except ArtifactMissing:
            gone += 1
    if turn % 20 == 0:
        assert store.scan().quarantined == ()
print(read, gone)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        assert int(output.split()[0]) > 10
    store = open_store(tmp_path, orphan_age_seconds=-1)
    report = store.scan()
    assert not report.quarantined + report.removed_temporaries + report.removed_orphans
    assert store.bytes_used <= 150_000
