"""KV in, the same KV out; anything else is refused."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from store_samples import (
    IDENTITY,
    LAYOUT,
    kv_of,
    open_store,
    overwrite,
    save,
    shard_path,
    token_ids,
    write_shard,
)

from memos_vllm.activation.store import (
    ArtifactIncomplete,
    ArtifactManifest,
    ArtifactStore,
    ArtifactUnreadable,
    ShardLayout,
    shard_file,
)
from memos_vllm.errors import ArtifactCorrupted, ArtifactMissing

TOKENS = 2500  # two and a half checksum chunks of 1,024 tokens


@pytest.fixture(params=["mapped", "copied"])
def how_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading: under a lease, and where the filesystem has none."""
    if request.param == "copied":
        monkeypatch.setattr(shard_file, "_take_read_lease", lambda fd: False)
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(tmp_path)


def read_all(store: ArtifactStore, manifest: ArtifactManifest) -> np.ndarray:
    with store.open_shards(manifest) as reader:
        return np.stack(
            [reader.layer(layer, num_tokens=manifest.num_tokens) for layer in reader.layers]
        )


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 1024, 1025, TOKENS])
def test_what_was_saved_is_read_bit_for_bit(
    store: ArtifactStore, how_read: str, num_tokens: int
) -> None:
    manifest = save(store, token_ids(num_tokens))
    assert np.array_equal(read_all(store, manifest), kv_of(2, num_tokens, 2, 8))


def test_growing_parts_of_a_layer_are_read_bit_for_bit(store: ArtifactStore, how_read: str) -> None:
    manifest, kv = save(store, token_ids(TOKENS)), kv_of(2, TOKENS, 2, 8)
    with store.open_shards(manifest) as reader:
        for num_tokens in (16, 1024, 1040, TOKENS, 32):
            for layer in (1, 0):
                part = reader.layer(layer, num_tokens=num_tokens)
                assert np.array_equal(part, kv[layer, :, :num_tokens])


@pytest.mark.parametrize(
    ("dtype", "raw"), [("float32", "u4"), ("float16", "u2"), ("float8_e4m3fn", "u1")]
)
def test_every_cache_dtype_keeps_its_width(store: ArtifactStore, dtype: str, raw: str) -> None:
    layout = ShardLayout(0, 1, 0, 1, 4, dtype)
    kv = np.random.default_rng(1).integers(0, 255, (2, 20, 1, 4)).astype(raw)
    with store.begin_shard(IDENTITY, token_ids(20), layout) as writer:
        writer.write_keys_values(0, kv[0], kv[1])
        entry = writer.finish()
    manifest = store.commit(
        IDENTITY, token_ids(20), total_layers=1, total_kv_heads=1, shards=[entry]
    )
    with store.open_shards(manifest) as reader:
        read = reader.layer(0, num_tokens=20)
    assert read.dtype == kv.dtype
    assert np.array_equal(read, kv)


def test_a_shard_is_a_safetensors_file_that_describes_itself(
    store: ArtifactStore, tmp_path: Path
) -> None:
    ids = token_ids(300)
    path = shard_path(tmp_path, save(store, ids))
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"kv", "token_ids", "checksums"}
        assert file.get_slice("kv").get_shape() == [2, 2, 300, 2, 8]
        assert file.get_slice("kv").get_dtype() == "BF16"
        assert file.get_tensor("token_ids").tolist() == ids
        metadata = file.metadata()
    assert metadata["format"] == "memos_vllm.kv"
    assert IDENTITY.fingerprint in metadata["identity"]
    raw = path.read_bytes()
    offset = 8 + int.from_bytes(raw[:8], "little")
    assert offset % 4096 == 0
    kv = kv_of(2, 300, 2, 8).tobytes()
    assert raw[offset : offset + len(kv)] == kv


def test_shards_of_four_ranks_are_read_as_one_and_by_other_ranks(
    store: ArtifactStore, how_read: str
) -> None:
    ids, kv = token_ids(200), kv_of(5, 200, 4, 8)
    entries = []
    for layers in (range(3), range(3, 5)):
        for heads in (range(2), range(2, 4)):
            layout = ShardLayout(layers.start, len(layers), heads.start, len(heads), 8, "bfloat16")
            part = kv[layers.start : layers.stop, :, :, heads.start : heads.stop]
            entries.append(write_shard(store, IDENTITY, ids, layout, part))
    manifest = store.commit(IDENTITY, ids, total_layers=5, total_kv_heads=4, shards=entries[::-1])
    assert np.array_equal(read_all(store, manifest), kv)
    with store.open_shards(manifest, layers=range(2, 4), heads=range(1, 4)) as reader:
        for layer in (2, 3):
            read = reader.layer(layer, num_tokens=150)
            assert np.array_equal(read, kv[layer, :, :150, 1:4])
        assert reader.layout(3).num_kv_heads == 3
        with pytest.raises(ValueError, match="not open"):
            reader.layer(1, num_tokens=150)
        with pytest.raises(ValueError, match="201 tokens"):
            reader.layer(2, num_tokens=201)
    with pytest.raises(ValueError, match="4 KV heads"):
        store.open_shards(manifest, heads=range(5))


@pytest.mark.parametrize(
    ("layers", "heads"), [((0, 1), (0, 2)), ((0, 2), (0, 1)), ((1, 2), (0, 2)), ((0, 2), (1, 2))]
)
def test_shards_that_do_not_tile_the_model_are_refused_and_removed(
    store: ArtifactStore, tmp_path: Path, layers: tuple[int, int], heads: tuple[int, int]
) -> None:
    layout = ShardLayout(layers[0], layers[1], heads[0], heads[1], 8, "bfloat16")
    kv = kv_of(layers[1], 20, heads[1], 8)
    entry = write_shard(store, IDENTITY, token_ids(20), layout, kv)
    with pytest.raises(ArtifactIncomplete):
        store.commit(IDENTITY, token_ids(20), total_layers=2, total_kv_heads=2, shards=[entry])
    assert not (tmp_path / "store" / entry.file_name).exists()


def test_a_shard_saved_for_other_tokens_is_refused(store: ArtifactStore) -> None:
    entry = write_shard(store, IDENTITY, token_ids(20), LAYOUT, kv_of(2, 20, 2, 8))
    other = token_ids(20, seed=9)
    with pytest.raises(ArtifactCorrupted, match="another artifact"):
        store.commit(IDENTITY, other, total_layers=2, total_kv_heads=2, shards=[entry])


def test_a_writer_refuses_wrong_layers_and_shapes(store: ArtifactStore, tmp_path: Path) -> None:
    kv = kv_of(2, 20, 2, 8)
    with store.begin_shard(IDENTITY, token_ids(20), LAYOUT) as writer:
        writer.write_layer(1, kv[1])
        for layer in (1, 2, -1):
            with pytest.raises(ValueError, match=f"layer {layer} is not"):
                writer.write_layer(layer, kv[0])
        for wrong in (kv[0, :, :19], kv[0].view(np.uint8), kv[0].astype(np.uint32)):
            with pytest.raises(ValueError, match="expected"):
                writer.write_layer(0, wrong)
        with pytest.raises(ValueError, match="layers \\[0\\]"):
            writer.finish()
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_layers_that_are_not_contiguous_are_saved_right(store: ArtifactStore) -> None:
    kv = kv_of(2, 40, 2, 8)
    strided = np.asfortranarray(kv)
    entry = write_shard(store, IDENTITY, token_ids(40), LAYOUT, strided)
    manifest = store.commit(
        IDENTITY, token_ids(40), total_layers=2, total_kv_heads=2, shards=[entry]
    )
    assert np.array_equal(read_all(store, manifest), kv)


def test_files_are_private_and_shards_read_only(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = save(store, token_ids(20))
    root = tmp_path / "store"
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o400 if "data" in path.parts else 0o600), path
    assert manifest.size_bytes == sum(
        (root / name).stat().st_size
        for name in (f"manifests/{manifest.key}.json", manifest.shards[0].file_name)
    )


def test_the_store_holds_at_most_two_percent_more_than_the_raw_kv(store: ArtifactStore) -> None:
    layout = ShardLayout(0, 30, 0, 3, 64, "bfloat16")
    kv = np.zeros((2, 3072, 3, 64), dtype=np.uint16)
    with store.begin_shard(IDENTITY, token_ids(3072), layout) as writer:
        for layer in layout.layers:
            writer.write_layer(layer, kv)
        entry = writer.finish()
    store.commit(IDENTITY, token_ids(3072), total_layers=30, total_kv_heads=3, shards=[entry])
    assert kv.nbytes * 30 < store.bytes_used <= 1.002 * kv.nbytes * 30


# What is bad is found.


@pytest.mark.parametrize(("layer", "half"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("token", [0, 1023, 1024, TOKENS - 1])
def test_a_flipped_byte_of_kv_is_found_when_it_would_be_used(  # noqa: PLR0917
    store: ArtifactStore, tmp_path: Path, how_read: str, layer: int, half: int, token: int
) -> None:
    manifest, kv = save(store, token_ids(TOKENS)), kv_of(2, TOKENS, 2, 8)
    overwrite(shard_path(tmp_path, manifest), 4096 + ((layer * 2 + half) * TOKENS + token) * 32 + 5)
    with store.open_shards(manifest) as reader:
        with pytest.raises(ArtifactCorrupted, match=f"{'KV'[half]} of layer {layer}"):
            reader.layer(layer, num_tokens=TOKENS)
        with pytest.raises(ArtifactCorrupted):
            reader.verify(TOKENS)
        other = 1 - layer
        assert np.array_equal(reader.layer(other, num_tokens=TOKENS), kv[other])
        if token >= 1024:
            assert np.array_equal(reader.layer(layer, num_tokens=1024), kv[layer, :, :1024])


def test_any_flipped_byte_of_header_ids_and_checksums_is_found_on_opening(
    store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = save(store, token_ids(20))
    path = shard_path(tmp_path, manifest)
    kv_bytes = 2 * 2 * 20 * 32
    tail = range(4096 + kv_bytes, path.stat().st_size)
    for offset in [*range(0, 1200, 13), 4095, *tail[::5], tail[-1]]:
        overwrite(path, offset)
        with pytest.raises(ArtifactCorrupted):
            store.open_shards(manifest)
        overwrite(path, offset)
    store.open_shards(manifest).close()


@pytest.mark.parametrize("keep", [0, 7, 100, 4096, 5000, -1])
def test_a_truncated_file_is_found_on_opening(
    store: ArtifactStore, tmp_path: Path, keep: int
) -> None:
    manifest = save(store, token_ids(TOKENS))
    path = shard_path(tmp_path, manifest)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    with pytest.raises(ArtifactCorrupted):
        store.open_shards(manifest)


def test_a_file_that_has_grown_is_found_on_opening(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = save(store, token_ids(20))
    path = shard_path(tmp_path, manifest)
    overwrite(path, path.stat().st_size, b"x")
    with pytest.raises(ArtifactCorrupted, match="truncated or has grown"):
        store.open_shards(manifest)


def test_a_file_truncated_while_it_is_copied_is_an_error_and_no_crash(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "_take_read_lease", lambda fd: False)
    manifest = save(store, token_ids(TOKENS))
    with store.open_shards(manifest) as reader:
        reader.verify_layer(0, num_tokens=TOKENS)
        os.truncate(shard_path(tmp_path, manifest), 4096)
        with pytest.raises(ArtifactCorrupted, match="truncated"):
            reader.verify_layer(1, num_tokens=TOKENS)
        assert np.array_equal(reader.layer(0, num_tokens=TOKENS), kv_of(2, TOKENS, 2, 8)[0])


def test_truncation_of_a_mapped_file_waits_until_the_reader_is_done(
    store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = save(store, token_ids(TOKENS))
    path = shard_path(tmp_path, manifest)
    if not has_leases(path):
        pytest.skip("this filesystem has no leases")
    reader = store.open_shards(manifest)
    code = "import os, sys; print('go', flush=True); os.truncate(sys.argv[1], 0)"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"go\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.3)
        with pytest.raises(ArtifactCorrupted, match="another process is writing"):
            reader.verify(TOKENS)
        assert path.stat().st_size == manifest.shards[0].size_bytes
        reader.close()
        assert other.wait(10) == 0
    with pytest.raises(ArtifactCorrupted, match="truncated"):
        store.open_shards(manifest)


def test_a_mapping_whose_file_was_truncated_anyway_is_an_error_and_no_crash(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worst case: the lease was broken by the kernel's time limit.
    monkeypatch.setattr(shard_file, "_take_read_lease", lambda fd: True)
    monkeypatch.setattr(shard_file.ShardFile, "_check_guard", lambda self: None)
    manifest = save(store, token_ids(TOKENS))
    with store.open_shards(manifest) as reader:
        os.truncate(shard_path(tmp_path, manifest), 4096)
        with pytest.raises(ArtifactCorrupted, match="cannot be read"):
            reader.verify(TOKENS)


def has_leases(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def test_views_outlive_the_reader_and_the_file(
    store: ArtifactStore, tmp_path: Path, how_read: str
) -> None:
    manifest = save(store, token_ids(TOKENS))
    with store.open_shards(manifest) as reader:
        view = reader.layer(1, num_tokens=TOKENS)
    assert store.discard(manifest.key, "test")
    assert np.array_equal(view, kv_of(2, TOKENS, 2, 8)[1])


def test_writing_to_a_view_leaves_the_file_alone(store: ArtifactStore, how_read: str) -> None:
    manifest = save(store, token_ids(40))
    with store.open_shards(manifest) as reader:
        reader.layer(0, num_tokens=40)[:] = 0
    assert np.array_equal(read_all(store, manifest), kv_of(2, 40, 2, 8))


def test_a_file_deleted_between_lookup_and_opening_is_missing(
    store: ArtifactStore, tmp_path: Path
) -> None:
    ids = token_ids(40)
    save(store, ids)
    match = store.lookup(IDENTITY, ids)
    assert match is not None
    shard_path(tmp_path, match.manifest).unlink()
    with pytest.raises(ArtifactMissing):
        store.open_shards(match.manifest)
    (tmp_path / "store" / "manifests" / f"{match.manifest.key}.json").unlink()
    with pytest.raises(ArtifactMissing):
        store.read_manifest(match.manifest.key)


def test_running_out_of_descriptors_condemns_no_artifact(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = save(store, token_ids(40))

    def refuse(*args: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(ArtifactUnreadable):
            store.open_shards(manifest)
    store.open_shards(manifest).close()


def test_a_symbolic_link_in_place_of_a_shard_is_not_followed(
    store: ArtifactStore, tmp_path: Path
) -> None:
    manifest = save(store, token_ids(40))
    path = shard_path(tmp_path, manifest)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactCorrupted):
        store.open_shards(manifest)
