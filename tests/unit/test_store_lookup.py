"""The longest stored prefix, within one identity, whatever is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from store_samples import IDENTITY, open_store, save, token_ids

from memos_vllm.activation.store import ArtifactManifest, PrefixIdentity
from memos_vllm.activation.store.manifest import artifact_key
from memos_vllm.activation.store.prefix_index import STRIDE_TOKENS, PrefixIndex
from memos_vllm.activation.store.types import as_token_ids

OTHER_NUMERICS = dataclasses.replace(IDENTITY, numerics="cuda-flash-bf16")
STRANGERS = [
    dataclasses.replace(IDENTITY, scope="0ther"),
    dataclasses.replace(IDENTITY, fingerprint="model-b"),
    dataclasses.replace(IDENTITY, renderer_version=2),
]


def manifest_of(
    ids: list[int], *, identity: PrefixIdentity = IDENTITY, created_at: float = 0.0
) -> ArtifactManifest:
    tokens = as_token_ids(ids)
    return ArtifactManifest(
        key=artifact_key(identity, tokens),
        identity=identity,
        token_ids=tokens,
        num_tokens=len(ids),
        total_layers=1,
        total_kv_heads=1,
        shards=(),
        created_at=created_at,
        size_bytes=len(ids),
    )


def common_length(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


# Few distinct ids and pieces of one stride: most pairs share something.
PIECE = st.sampled_from([[1] * 16, [2] * 16, [1] * 15 + [2], [2] + [1] * 15])
IDS = st.builds(
    lambda pieces, tail: [i for piece in pieces for i in piece] + tail,
    st.lists(PIECE, max_size=6),
    st.lists(st.integers(1, 2), max_size=18),
)
IDENTITIES = st.sampled_from([IDENTITY, OTHER_NUMERICS, *STRANGERS])


class IndexAgainstNaiveModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.stored: dict[str, ArtifactManifest] = {}
        self.time = 0.0

    @rule(ids=IDS, identity=IDENTITIES)
    def add(self, ids: list[int], identity: PrefixIdentity) -> None:
        self.time += 1
        manifest = manifest_of(ids, identity=identity, created_at=self.time)
        self.index.add(manifest)
        self.stored[manifest.key] = manifest

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.stored, "unknown"]))
        assert self.index.remove(key) == (self.stored.pop(key, None) is not None)

    @rule(ids=IDS, identity=IDENTITIES, any_numerics=st.booleans())
    def look_up(self, ids: list[int], identity: PrefixIdentity, any_numerics: bool) -> None:
        def usable(other: PrefixIdentity) -> bool:
            if any_numerics:
                other = dataclasses.replace(other, numerics=identity.numerics)
            return other == identity

        shared = {
            key: common_length(ids, manifest.token_ids.tolist())
            for key, manifest in self.stored.items()
            if usable(manifest.identity)
        }
        longest = max(shared.values(), default=0)
        match = self.index.lookup(identity, ids, any_numerics=any_numerics)
        if longest < STRIDE_TOKENS:
            assert match is None
            return
        assert match is not None
        assert match.num_tokens == longest
        assert shared[match.manifest.key] == longest
        # Of equals: our own numerics, then the newest.
        equals = [self.stored[key] for key, length in shared.items() if length == longest]
        assert match.manifest is max(
            equals, key=lambda m: (m.identity.numerics == identity.numerics, m.created_at)
        )

    @invariant()
    def sizes_agree(self) -> None:
        assert len(self.index) == len(self.stored)
        assert self.index.bytes_used == sum(m.size_bytes for m in self.stored.values())


TestIndexAgainstNaiveModel = IndexAgainstNaiveModel.TestCase
TestIndexAgainstNaiveModel.settings = settings(max_examples=60, stateful_step_count=25)


@given(
    st.one_of(
        st.none(),
        st.text(),
        st.binary(max_size=200),
        st.integers(),
        st.dictionaries(st.integers(), st.integers(), max_size=3),
        st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.text()), max_size=40),
        st.just(np.zeros((4, 16), dtype=np.int64)),
        st.just(np.full(32, -1)),
        st.just(np.zeros(32, dtype=np.float32)),
    )
)
def test_a_lookup_of_anything_answers_and_never_raises(query: object) -> None:
    index = PrefixIndex()
    index.add(manifest_of(token_ids(64)))
    assert index.lookup(IDENTITY, query) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_ids_of_any_usual_kind_are_found(kind: type) -> None:
    index, ids = PrefixIndex(), token_ids(64)
    index.add(manifest_of(ids))
    match = index.lookup(IDENTITY, kind([*ids, 5, 6]))
    assert match is not None
    assert match.num_tokens == 64


def test_a_digest_collision_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, data: bytes = b"") -> None: ...

        def update(self, data: bytes) -> None: ...

        def digest(self, length: int) -> bytes:
            return bytes(length)

    monkeypatch.setattr("memos_vllm.activation.store.prefix_index.blake3", Constant)
    index = PrefixIndex()
    index.add(manifest_of([1] * 16))
    assert index.lookup(IDENTITY, [2] * 16) is None


def test_a_saved_artifact_is_found_by_its_own_tokens_and_by_its_start(tmp_path: Path) -> None:
    store, ids = open_store(tmp_path), token_ids(100)
    assert not store.contains(IDENTITY, ids)
    manifest = save(store, ids)
    assert store.contains(IDENTITY, ids)
    assert not store.contains(IDENTITY, ids[:99])
    assert not store.contains(IDENTITY, ["a"])  # type: ignore[list-item]
    for query, length in ((ids, 100), (ids + [7] * 50, 100), (ids[:40] + [0] * 9, 40)):
        match = store.lookup(IDENTITY, query)
        assert match is not None
        assert (match.manifest.key, match.num_tokens) == (manifest.key, length)
    assert store.lookup(IDENTITY, ids[:15]) is None
    for stranger in STRANGERS:
        assert store.lookup(stranger, ids, any_numerics=True) is None
    assert store.lookup(OTHER_NUMERICS, ids) is None
    assert store.lookup(OTHER_NUMERICS, ids, any_numerics=True) is not None
