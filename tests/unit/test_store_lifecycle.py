"""Budget, pins, erasing, quarantine, the startup scan, and other processes' changes."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from store_samples import (
    IDENTITY,
    LAYOUT,
    Clock,
    files_of,
    kv_of,
    open_store,
    overwrite,
    save,
    shard_path,
    token_ids,
    write_shard,
)

from memos_vllm.activation.store import (
    ArtifactScopeErased,
    ArtifactStore,
    ArtifactStoreFull,
    ArtifactUsage,
)

OTHER_SCOPE = dataclasses.replace(IDENTITY, scope="0ther")


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


def size_of_one(tmp_path: Path) -> int:
    return save(open_store(tmp_path / "probe"), token_ids(100)).size_bytes


def keys(store: ArtifactStore) -> list[bool]:
    """Which of the artifacts of seeds 0, 1, 2, ... are there."""
    return [store.contains(IDENTITY, token_ids(100, seed=seed)) for seed in range(4)]


# The budget.


def test_the_least_recently_used_is_evicted_when_the_budget_is_short(
    tmp_path: Path, clock: Clock
) -> None:
    store = open_store(tmp_path, budget_bytes=int(3.5 * size_of_one(tmp_path)), clock=clock)
    saved = []
    for seed in range(3):
        saved.append(save(store, token_ids(100, seed=seed), seed=seed))
        clock.now += 100
    store.mark_used(saved[0].key)
    clock.now += 100
    save(store, token_ids(100, seed=3), seed=3)
    assert keys(store) == [True, False, True, True]
    assert not shard_path(tmp_path, saved[1]).exists()
    assert store.stats().evicted == 1
    assert store.bytes_used == sum(
        (tmp_path / "store" / name).stat().st_size for name in files_of(tmp_path)
    )


def test_uses_are_remembered_over_a_restart(tmp_path: Path, clock: Clock) -> None:
    store = open_store(tmp_path, clock=clock)
    saved = [save(store, token_ids(100, seed=seed), seed=seed) for seed in range(2)]
    clock.now += 1000
    store.mark_used(saved[0].key)
    again = open_store(tmp_path, budget_bytes=int(1.5 * saved[0].size_bytes), clock=clock)
    assert again.scan().evicted == (saved[1].key,)
    assert keys(again)[:2] == [True, False]


def test_a_pinned_artifact_is_not_evicted_and_a_save_beside_it_is_refused(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path, budget_bytes=int(1.5 * size_of_one(tmp_path)))
    manifest = save(store, token_ids(100))
    store.pin(manifest.key)
    store.pin(manifest.key)
    store.unpin(manifest.key)
    with pytest.raises(ArtifactStoreFull, match="raise the budget"):
        store.admit(IDENTITY, manifest.size_bytes)
    with pytest.raises(ArtifactStoreFull):
        save(store, token_ids(100, seed=1), seed=1)
    assert keys(store)[:2] == [True, False]
    assert len(files_of(tmp_path)) == 2
    store.unpin(manifest.key)
    store.unpin(manifest.key)
    store.admit(IDENTITY, manifest.size_bytes)
    save(store, token_ids(100, seed=1), seed=1)
    assert keys(store)[:2] == [False, True]


def test_a_save_over_the_whole_budget_is_refused_and_evicts_nobody(tmp_path: Path) -> None:
    store = open_store(tmp_path, budget_bytes=int(1.5 * size_of_one(tmp_path)))
    save(store, token_ids(100))
    with pytest.raises(ArtifactStoreFull):
        save(store, token_ids(300, seed=1), seed=1)
    assert keys(store)[:2] == [True, False]
    assert store.stats().refused == 1


def test_saving_the_same_again_fits_where_it_fitted_before(tmp_path: Path) -> None:
    store = open_store(tmp_path, budget_bytes=int(1.5 * size_of_one(tmp_path)))
    first = save(store, token_ids(100))
    same = save(store, token_ids(100))
    assert same.shards == first.shards
    other_bits = save(store, token_ids(100), seed=5)
    assert other_bits.key == first.key
    assert not shard_path(tmp_path, first).exists()
    with store.open_shards(other_bits) as reader:
        assert np.array_equal(reader.layer(1, num_tokens=100), kv_of(2, 100, 2, 8, seed=5)[1])
    assert store.num_artifacts == 1
    assert len(files_of(tmp_path)) == 2


def test_a_smaller_budget_is_met_and_the_policy_is_pluggable(tmp_path: Path) -> None:
    class NewestFirst:
        def order(self, candidates: Sequence[ArtifactUsage], *, now: float) -> list[ArtifactUsage]:
            return sorted(candidates, key=lambda usage: -usage.created_at)

    one = size_of_one(tmp_path)
    writer = open_store(tmp_path)
    for seed in range(4):
        save(writer, token_ids(100, seed=seed), seed=seed)
    store = open_store(tmp_path, budget_bytes=int(2.5 * one), eviction_policy=NewestFirst())
    assert len(store.evict_to_budget()) == 2
    assert keys(store) == [True, True, False, False]


# Dropping.


def test_discarding_removes_every_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = save(store, token_ids(100))
    assert store.discard(manifest.key, "test")
    assert not store.discard(manifest.key, "test")
    assert files_of(tmp_path) == set()
    assert store.bytes_used == 0
    assert store.lookup(IDENTITY, token_ids(100)) is None


def test_a_forgotten_artifact_stays_on_disk_until_it_is_saved_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = save(store, token_ids(100))
    store.refresh()
    store.forget(manifest.key)
    store.refresh()
    assert store.lookup(IDENTITY, token_ids(100)) is None
    assert len(files_of(tmp_path)) == 2
    save(store, token_ids(100), seed=1)
    assert store.lookup(IDENTITY, token_ids(100)) is not None


def test_erasing_a_scope_leaves_none_of_its_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, token_ids(100))
    save(store, token_ids(100, seed=1), seed=1)
    bad = save(store, token_ids(100, seed=2), seed=2)
    kept = save(store, token_ids(100), identity=OTHER_SCOPE)
    store.quarantine(bad.key, "test")
    write_shard(store, IDENTITY, token_ids(50), LAYOUT, kv_of(2, 50, 2, 8))
    under_way = store.begin_shard(IDENTITY, token_ids(60), LAYOUT)
    assert store.discard_scope(IDENTITY.scope) == 2
    for layer in LAYOUT.layers:
        under_way.write_layer(layer, kv_of(2, 60, 2, 8)[layer])
    with pytest.raises(ArtifactScopeErased):
        under_way.finish()
    left = {name for name in files_of(tmp_path) if not name.startswith("erased/")}
    assert left == {f"manifests/{kept.key}.json", kept.shards[0].file_name}
    assert store.contains(OTHER_SCOPE, token_ids(100))


def test_an_erased_scope_is_refused_in_every_process(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    entry = write_shard(other, IDENTITY, token_ids(20), LAYOUT, kv_of(2, 20, 2, 8))
    young = shard_path(tmp_path, dataclasses.replace(save(store, token_ids(30)), shards=(entry,)))
    store.discard_scope(IDENTITY.scope)
    assert not young.exists()
    with pytest.raises(ArtifactScopeErased):
        other.begin_shard(IDENTITY, token_ids(20), LAYOUT)
    with pytest.raises(ArtifactScopeErased):
        other.admit(IDENTITY, 1)
    with pytest.raises(ArtifactScopeErased):
        other.commit(IDENTITY, token_ids(20), total_layers=2, total_kv_heads=2, shards=[entry])


def test_erasing_that_was_cut_short_is_finished_by_the_scan(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, token_ids(100))
    store._paths.erased_mark(IDENTITY.scope).touch()
    again = open_store(tmp_path)
    again.scan()
    assert again.num_artifacts == 0
    assert all(name.startswith("erased/") for name in files_of(tmp_path))


def test_quarantine_keeps_the_evidence_and_the_reason(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = save(store, token_ids(100))
    assert store.quarantine(manifest.key, "K of layer 3 differs")
    folder = tmp_path / "store" / "quarantine"
    notes = [json.loads(path.read_bytes()) for path in folder.glob("*.reason.json")]
    assert {note["file"] for note in notes} == {
        f"manifests/{manifest.key}.json",
        manifest.shards[0].file_name,
    }
    assert {note["reason"] for note in notes} == {"K of layer 3 differs"}
    assert all(name.startswith("quarantine/") for name in files_of(tmp_path))
    stats = store.stats()
    assert (stats.num_artifacts, stats.num_quarantined, stats.quarantined) == (0, 2, 1)


def test_the_oldest_of_the_quarantine_goes_when_it_is_full(tmp_path: Path, clock: Clock) -> None:
    one = size_of_one(tmp_path)
    store = open_store(tmp_path, quarantine_budget_bytes=int(2.5 * one), clock=clock)
    saved = [save(store, token_ids(100, seed=seed), seed=seed) for seed in range(3)]
    for manifest in saved:
        clock.now += 1
        store.quarantine(manifest.key, "test")
    names = " ".join(files_of(tmp_path))
    assert [m.shards[0].content_digest in names for m in saved] == [False, True, True]
    assert store.stats().quarantine_bytes <= 2.5 * one


# The startup scan.


def test_a_scan_of_a_sound_store_changes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for seed in range(3):
        save(store, token_ids(100, seed=seed), seed=seed)
    before = files_of(tmp_path)
    again = open_store(tmp_path)
    report = again.scan()
    assert report.num_artifacts == 3
    assert not report.quarantined + report.removed_temporaries + report.removed_orphans
    assert files_of(tmp_path) == before
    assert again.bytes_used == store.bytes_used
    assert keys(again) == [True, True, True, False]


@pytest.mark.parametrize(
    "harm", ["manifest byte", "shard header", "checksum table", "short shard", "no shard"]
)
def test_a_scan_sets_aside_what_is_torn_and_keeps_the_rest(tmp_path: Path, harm: str) -> None:
    store = open_store(tmp_path)
    bad = save(store, token_ids(100))
    save(store, token_ids(100, seed=1), seed=1)
    shard = shard_path(tmp_path, bad)
    if harm == "manifest byte":
        overwrite(tmp_path / "store" / "manifests" / f"{bad.key}.json", 300)
    elif harm == "shard header":
        overwrite(shard, 50)
    elif harm == "checksum table":
        overwrite(shard, shard.stat().st_size - 1)
    elif harm == "short shard":
        os.truncate(shard, 4096)
    else:
        shard.unlink()
    again = open_store(tmp_path)
    report = again.scan()
    assert report.num_artifacts == 1
    assert f"manifests/{bad.key}.json" in report.quarantined
    assert keys(again)[:2] == [False, True]
    assert again.scan().quarantined == ()


def test_a_store_signed_with_another_key_is_set_aside_whole(tmp_path: Path) -> None:
    save(open_store(tmp_path), token_ids(100))
    store = open_store(tmp_path, mac_key=b"y" * 32)
    assert len(store.scan().quarantined) == 1
    assert store.num_artifacts == 0
    save(store, token_ids(100))
    assert open_store(tmp_path, mac_key=b"y" * 32).scan().num_artifacts == 1


def test_a_scan_sets_unknown_files_aside(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    root = tmp_path / "store"
    (root / "data" / "notes.txt").write_text("hello")
    (root / "data" / "00").mkdir()
    (root / "data" / "00" / f"{'1' * 64}.safetensors").write_text("in the wrong folder")
    (root / "manifests" / "0.json").write_text("{}")
    report = store.scan()
    assert sorted(report.quarantined) == [
        f"data/00/{'1' * 64}.safetensors",
        "data/notes.txt",
        "manifests/0.json",
    ]


def test_a_shard_without_a_manifest_is_swept_when_it_is_old(tmp_path: Path, clock: Clock) -> None:
    store = open_store(tmp_path, clock=clock, orphan_age_seconds=600)
    entry = write_shard(store, IDENTITY, token_ids(20), LAYOUT, kv_of(2, 20, 2, 8))
    assert store.scan().removed_orphans == ()
    clock.now += 601
    assert store.scan().removed_orphans == (entry.file_name,)
    assert files_of(tmp_path) == set()


def test_the_temporary_of_a_living_writer_is_left_alone_and_a_dead_ones_removed(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)
    (tmp_path / "store" / "tmp" / "4711-dead.tmp").write_bytes(b"x")
    writer = store.begin_shard(IDENTITY, token_ids(20), LAYOUT)
    assert store.scan().removed_temporaries == ("tmp/4711-dead.tmp",)
    assert len(files_of(tmp_path)) == 1
    for layer in LAYOUT.layers:
        writer.write_layer(layer, kv_of(2, 20, 2, 8)[layer])
    entry = writer.finish()
    store.commit(IDENTITY, token_ids(20), total_layers=2, total_kv_heads=2, shards=[entry])
    assert open_store(tmp_path).scan().num_artifacts == 1


def test_an_unreadable_manifest_is_no_reason_to_sweep_its_shards(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(open_store(tmp_path), token_ids(100))
    clock.now += 10_000
    store = open_store(tmp_path, clock=clock)

    def refuse(self: Path, *args: object) -> object:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        report = store.scan()
    assert report.num_artifacts == 0
    assert report.quarantined + report.removed_orphans == ()
    assert store.scan().num_artifacts == 1


# Other processes.


def test_a_refresh_sees_what_another_process_saved_replaced_and_removed(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    first = save(other, token_ids(100))
    assert store.lookup(IDENTITY, token_ids(100)) is None
    assert store.refresh()
    match = store.lookup(IDENTITY, token_ids(100))
    assert match is not None
    second = save(other, token_ids(100), seed=1)
    assert store.refresh()
    match = store.lookup(IDENTITY, token_ids(100))
    assert match is not None
    assert match.manifest.shards == second.shards != first.shards
    other.discard(first.key, "test")
    assert store.refresh()
    assert store.lookup(IDENTITY, token_ids(100)) is None
    assert store.bytes_used == 0
    assert not store.refresh()


def test_a_change_in_the_same_clock_tick_as_the_last_look_is_seen(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    folder = tmp_path / "store" / "manifests"
    save(other, token_ids(100))
    store.refresh()
    tick = folder.stat().st_mtime_ns
    save(other, token_ids(100, seed=1), seed=1)
    os.utime(folder, ns=(tick, tick))
    assert store.refresh()
    assert keys(store)[:2] == [True, True]


def test_a_commit_counts_what_other_processes_saved_against_the_budget(tmp_path: Path) -> None:
    budget = int(2.5 * size_of_one(tmp_path))
    one, two = (open_store(tmp_path, budget_bytes=budget) for _ in range(2))
    for seed, store in enumerate((one, two, one, two)):
        save(store, token_ids(100, seed=seed), seed=seed)
    assert two.num_artifacts == 2
    assert len(files_of(tmp_path)) == 4
