"""A manifest is believed only whole, unaltered, and signed with our key."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from store_samples import IDENTITY, MAC_KEY, open_store, overwrite, save, token_ids

from memos_vllm.activation.store import ArtifactStore
from memos_vllm.activation.store.manifest import decode_manifest, encode_manifest
from memos_vllm.errors import ArtifactCorrupted, ArtifactMissing


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(tmp_path)


def test_a_manifest_is_read_as_it_was_written(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = save(store, token_ids(50))
    read = store.read_manifest(manifest.key)
    assert read == manifest
    assert read.token_ids.tolist() == token_ids(50)
    content = json.loads((tmp_path / "store" / "manifests" / f"{manifest.key}.json").read_bytes())
    assert content["manifest"]["identity"]["fingerprint"] == IDENTITY.fingerprint


def test_a_manifest_travels_between_processes(store: ArtifactStore) -> None:
    manifest = save(store, token_ids(50))
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy == manifest
    assert np.array_equal(copy.token_ids, manifest.token_ids)
    store.open_shards(copy).close()


def test_any_flipped_byte_of_a_manifest_is_found(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = save(store, token_ids(20))
    path = tmp_path / "store" / "manifests" / f"{manifest.key}.json"
    for offset in range(path.stat().st_size):
        overwrite(path, offset)
        with pytest.raises(ArtifactCorrupted):
            store.read_manifest(manifest.key)
        overwrite(path, offset)
    assert store.read_manifest(manifest.key) == manifest


def test_any_truncation_of_a_manifest_is_found(store: ArtifactStore) -> None:
    manifest = save(store, token_ids(20))
    data = encode_manifest(manifest, mac_key=MAC_KEY)
    for length in [*range(len(data)), len(data) + 1]:
        with pytest.raises(ArtifactCorrupted):
            decode_manifest((data + b" ")[:length], key=manifest.key, mac_key=MAC_KEY)


def test_another_key_does_not_open_a_manifest(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = save(store, token_ids(20))
    other = open_store(tmp_path, mac_key=b"x" * 32)
    with pytest.raises(ArtifactCorrupted, match="another key"):
        other.read_manifest(manifest.key)
    other.refresh()
    assert other.lookup(IDENTITY, token_ids(20)) is None


def test_a_manifest_under_another_artifacts_name_is_not_believed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    one, two = save(store, token_ids(20)), save(store, token_ids(20, seed=1), seed=1)
    folder = tmp_path / "store" / "manifests"
    (folder / f"{one.key}.json").replace(folder / f"{two.key}.json")
    with pytest.raises(ArtifactCorrupted, match="that of artifact"):
        store.read_manifest(two.key)


def test_a_manifest_that_names_another_artifacts_shard_opens_nothing(store: ArtifactStore) -> None:
    one, two = save(store, token_ids(20)), save(store, token_ids(20, seed=1), seed=1)
    mixed = dataclasses.replace(one, shards=two.shards)
    with pytest.raises(ArtifactCorrupted, match="another artifact"):
        store.open_shards(mixed)
    stranger = dataclasses.replace(
        one, identity=dataclasses.replace(IDENTITY, fingerprint="model-b")
    )
    with pytest.raises(ArtifactCorrupted, match="another artifact"):
        store.open_shards(stranger)


def test_identity_and_tokens_both_decide_the_key(store: ArtifactStore) -> None:
    keys = {save(store, token_ids(20), identity=IDENTITY).key}
    for change in (
        {"scope": "x"},
        {"fingerprint": "x"},
        {"numerics": "x"},
        {"renderer_version": 9},
    ):
        changed = dataclasses.replace(IDENTITY, **change)
        keys.add(save(store, token_ids(20), identity=changed).key)
    keys.add(save(store, token_ids(21)).key)
    assert len(keys) == 6


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 63, "G" * 64, "0" * 64])
def test_only_a_key_becomes_part_of_a_path(store: ArtifactStore, key: str) -> None:
    with pytest.raises(ArtifactMissing):
        store.read_manifest(key)
    assert not store.discard(key, "test")
    assert not store.quarantine(key, "test")
    store.mark_used(key)


def test_a_mac_key_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not 32"):
        open_store(tmp_path, mac_key=b"short")
