"""Which artifacts go when the budget is short: those of the fewest uses lately."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest
from store_samples import IDENTITY, Clock, open_store, save, token_ids

from memos_vllm.activation.store import ArtifactManifest, ArtifactStore
from memos_vllm.activation.store.worth import HALF_LIFE_SECONDS, Worth

DAY = 86_400.0


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def one(tmp_path: Path) -> int:
    """The size of one artifact."""
    return save(open_store(tmp_path / "probe"), token_ids(100)).size_bytes


def cube(name: str, *, text: int = 0, store: ArtifactStore) -> ArtifactManifest:
    """Save a cube's memory; another `text` is the memory after an edit."""
    identity = dataclasses.replace(IDENTITY, scope=name)
    return save(store, token_ids(100, seed=text), identity=identity, seed=text)


def keys(store: ArtifactStore) -> set[str]:
    return {manifest.key for manifest in store._index.manifests()}


def use(store: ArtifactStore, clock: Clock, manifest: ArtifactManifest, *, times: int) -> None:
    for _ in range(times):
        store.mark_used(manifest.key)
        clock.now += 60


def test_what_is_asked_often_outlives_a_flood_of_what_is_asked_once(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, budget_bytes=int(3.5 * one), clock=clock)
    often = [cube("a", store=store), cube("b", store=store)]
    for manifest in often:
        use(store, clock, manifest, times=3)
    for number in range(20):
        clock.now += 60
        last = cube(f"stranger-{number}", store=store)
    assert keys(store) == {*(manifest.key for manifest in often), last.key}


def test_old_uses_are_worth_less_than_a_new_one_after_a_while(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, budget_bytes=int(2.5 * one), clock=clock)
    once_hot = cube("a", store=store)
    use(store, clock, once_hot, times=7)
    clock.now += 3.5 * HALF_LIFE_SECONDS
    newer = cube("b", store=store)
    clock.now += 60
    newest = cube("c", store=store)
    assert keys(store) == {newer.key, newest.key}


def test_after_an_edit_the_former_text_goes_first_and_the_new_one_keeps_the_uses(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, budget_bytes=int(3.5 * one), clock=clock)
    former = cube("a", store=store)
    use(store, clock, former, times=20)
    edited = cube("a", text=1, store=store)
    clock.now += 60
    first = cube("b", store=store)
    clock.now += 60
    second = cube("c", store=store)
    assert keys(store) == {edited.key, first.key, second.key}
    clock.now += 60
    third = cube("d", store=store)
    assert keys(store) == {edited.key, second.key, third.key}


def test_a_text_that_takes_the_place_of_another_makes_that_one_go_for_it(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, budget_bytes=int(2.5 * one), clock=clock)
    former = cube("a", store=store)
    use(store, clock, former, times=20)
    other = cube("b", store=store)
    clock.now += 60
    use(store, clock, other, times=1)
    edited = cube("a", text=1, store=store)
    assert keys(store) == {other.key, edited.key}


def test_another_models_artifacts_of_a_cube_keep_their_uses(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, budget_bytes=int(2.5 * one), clock=clock)
    ours = cube("a", store=store)
    use(store, clock, ours, times=3)
    theirs = dataclasses.replace(IDENTITY, scope="a", fingerprint="model-b")
    save(store, token_ids(100, seed=7), identity=theirs, seed=7)
    clock.now += 60
    cube("b", store=store)
    assert ours.key in keys(store)


def test_what_comes_back_is_not_taken_for_new(tmp_path: Path, clock: Clock, one: int) -> None:
    store = open_store(tmp_path, budget_bytes=int(2.5 * one), clock=clock)
    back = cube("a", store=store)
    for name in ("b", "c"):
        clock.now += 60
        cube(name, store=store)
    assert back.key not in keys(store)
    clock.now += 60
    cube("a", store=store)
    for name in ("d", "e"):
        clock.now += 60
        cube(name, store=store)
    assert back.key in keys(store)


def test_uses_outlive_the_process_to_the_minute(tmp_path: Path, clock: Clock, one: int) -> None:
    store = open_store(tmp_path, clock=clock)
    often, once = cube("a", store=store), cube("b", store=store)
    use(store, clock, often, times=5)
    clock.now += DAY
    use(store, clock, once, times=1)
    again = open_store(tmp_path, budget_bytes=int(1.5 * one), clock=clock)
    assert again.scan().evicted == (once.key,)


def test_what_another_process_used_is_seen_before_something_goes(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    ours = open_store(tmp_path, budget_bytes=int(2.5 * one), clock=clock)
    first = cube("a", store=ours)
    clock.now += 60
    second = cube("b", store=ours)
    theirs = open_store(tmp_path, clock=clock)
    theirs.scan()
    clock.now += 60
    use(theirs, clock, first, times=2)
    cube("c", store=ours)
    assert first.key in keys(ours)
    assert second.key not in keys(ours)


def test_uses_by_two_processes_add_up(tmp_path: Path, clock: Clock) -> None:
    ours = open_store(tmp_path, clock=clock)
    manifest = cube("a", store=ours)
    theirs = open_store(tmp_path, clock=clock)
    theirs.scan()
    for store in (ours, theirs) * 3:
        clock.now += 60
        store.mark_used(manifest.key)
    path = ours._paths.manifest(manifest.key)
    # Seven uses within minutes.
    assert path.stat().st_mtime - clock.now == pytest.approx(2.807 * HALF_LIFE_SECONDS, rel=0.01)


def test_a_time_from_a_wrong_clock_is_not_believed_for_ever(
    tmp_path: Path, clock: Clock, one: int
) -> None:
    store = open_store(tmp_path, clock=clock)
    strange = cube("a", store=store)
    path = store._paths.manifest(strange.key)
    os.utime(path, (clock.now, clock.now + 3650 * DAY))
    again = open_store(tmp_path, budget_bytes=int(1.5 * one), clock=clock)
    again.scan()
    clock.now += 50 * DAY
    newer = cube("b", store=again)
    assert keys(again) == {newer.key}


def test_nothing_of_an_erased_scope_is_remembered(tmp_path: Path, clock: Clock, one: int) -> None:
    store = open_store(tmp_path, budget_bytes=int(1.5 * one), clock=clock)
    for name in ("a", "b"):
        cube(name, store=store)
        clock.now += 60
    assert [identity.scope for identity in store._ledger.worth._gone] == ["a"]
    store.discard_scope("a")
    store.discard_scope("b")
    assert not store._ledger.worth._gone
    assert not store._ledger.worth._worth


def test_only_so_many_names_of_what_went_are_remembered() -> None:
    worth = Worth(names=2)
    identities = [dataclasses.replace(IDENTITY, scope=name) for name in "abc"]
    for identity in identities:
        worth.succeed(identity.scope, identity, [], now=1.0)
        worth.evict(identity.scope, identity)
    assert list(worth._gone) == identities[1:]
