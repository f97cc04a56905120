"""Artifacts that travel from one store to another."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_samples import IDENTITY, files_of, kv_of, open_store, save, shard_path, token_ids

from memos_vllm.activation.store import ArtifactManifest, ArtifactStore
from memos_vllm.activation.store.portable import adopt, describe, open_shard, read_description
from memos_vllm.errors import ArtifactCorrupted, ArtifactError

IDS = token_ids(300)
SCOPE = "another server's scope"


def carried(root: Path) -> tuple[bytes, bytes]:
    """An artifact's description and its one shard."""
    store = open_store(root)
    manifest = save(store, IDS)
    with open_shard(store, manifest.shards[0]) as file:
        return describe(manifest), file.read()


def take(store: ArtifactStore, description: bytes, *shards: bytes) -> ArtifactManifest:
    return adopt(
        store,
        read_description(description),
        scope=SCOPE,
        shards=[(len(shard), io.BytesIO(shard)) for shard in shards],
    )


def test_an_artifact_is_the_same_under_the_new_scope_and_key(tmp_path: Path) -> None:
    description, shard = carried(tmp_path / "a")
    store = open_store(tmp_path / "b", mac_key=bytes(32))
    manifest = take(store, description, shard)
    found = store.lookup(replace(IDENTITY, scope=SCOPE), IDS)
    assert found is not None
    assert (found.manifest.key, found.num_tokens) == (manifest.key, len(IDS))
    assert store.lookup(IDENTITY, IDS) is None
    with store.open_shards(store.read_manifest(manifest.key)) as reader:
        for layer, kv in enumerate(kv_of(2, len(IDS), 2, 8)):
            np.testing.assert_array_equal(reader.layer(layer, num_tokens=len(IDS)), kv)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_shard_with_any_bit_turned_is_refused_and_nothing_is_left(
    tmp_path: Path, place: float, bit: int
) -> None:
    folder = tmp_path / os.urandom(4).hex()
    folder.mkdir()
    description, shard = carried(folder / "a")
    changed = bytearray(shard)
    changed[int(place * len(shard))] ^= 1 << bit
    store = open_store(folder / "b")
    with pytest.raises(ArtifactError):
        take(store, description, bytes(changed))
    assert files_of(folder / "b") == set()
    assert store.num_artifacts == 0


def test_shards_that_are_cut_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    description, shard = carried(tmp_path / "a")
    store = open_store(tmp_path / "b")
    for shards in ([], [shard[:-1]], [shard[:100]], [shard + b"x"], [shard, shard], [b""]):
        with pytest.raises(ArtifactCorrupted):
            take(store, description, *shards)
    assert files_of(tmp_path / "b") == set()


def _set(path: str, value: object) -> Any:
    def change(fields: Any) -> None:
        *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
        for step in steps:
            fields = fields[step]
        fields[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("token_ids", ""),
        _set("token_ids", "AAAA"),
        _set("shards", []),
        _set("shards.0.layout.num_layers", 10**9),
        _set("shards.0.layout.num_layers", -1),
        _set("shards.0.layout.head_dim", "8"),
        _set("shards.0.layout.dtype", "object"),
        _set("shards.0.layout.encoding", "../x"),
        _set("shards.0.layout", None),
        _set("total_layers", 0),
        _set("total_layers", True),
        _set("identity.scope", 5),
        _set("version", 99),
    ],
)
def test_a_description_that_no_store_writes_is_refused(tmp_path: Path, change: Any) -> None:
    description, shard = carried(tmp_path / "a")
    fields = json.loads(description)
    change(fields)
    store = open_store(tmp_path / "b")
    with pytest.raises(ArtifactError):
        take(store, json.dumps(fields).encode(), shard)
    assert files_of(tmp_path / "b") == set()


def test_a_shard_of_another_artifact_is_refused(tmp_path: Path) -> None:
    description, _ = carried(tmp_path / "a")
    other = open_store(tmp_path / "c")
    manifest = save(other, IDS, seed=1)
    with pytest.raises(ArtifactCorrupted):
        take(
            open_store(tmp_path / "b"),
            description,
            shard_path(tmp_path / "c", manifest).read_bytes(),
        )
