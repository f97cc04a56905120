"""The model's fingerprint: equal for the same function of token ids, different otherwise."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memos_vllm.activation import fingerprint as module
from memos_vllm.activation.fingerprint import (
    Fingerprint,
    NumericsClass,
    model_fingerprint,
    relevant_config,
    same_kv_scale,
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "sliding_window": None,
    "vocab_size": 49152,
}
NUMERICS = NumericsClass(
    device="cpu",
    isa="amx",
    tensor_parallel=1,
    pipeline_parallel=1,
    attention_backend="CPU_ATTN",
    kv_dtype="bfloat16",
    model_dtype="bfloat16",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def identify(model: Path | str, cache: Path, **changes: Any) -> Fingerprint:
    options: dict[str, Any] = {
        "revision": None,
        "dtype": "bfloat16",
        "config": CONFIG,
        "quantization": None,
        "load_format": "auto",
        "seed": 0,
        **changes,
    }
    return model_fingerprint(model, cache_dir=cache, **options)


def test_the_place_of_the_folder_does_not_count(model: Path, tmp_path: Path) -> None:
    here = identify(model, tmp_path / "cache")
    there = model.rename(tmp_path / "elsewhere")
    assert identify(there, tmp_path / "cache") == here
    assert here.verified
    assert here.weights.startswith("blake3:")


def test_one_changed_byte_of_the_weights_counts(model: Path, tmp_path: Path) -> None:
    before = identify(model, tmp_path / "cache")
    file = model / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    # Same size, same name, mtime set back: only ctime tells.
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identify(model, tmp_path / "cache").digest != before.digest


def test_the_tokenizer_and_foreign_files_do_not_count(model: Path, tmp_path: Path) -> None:
    before = identify(model, tmp_path / "cache")
    (model / "tokenizer.json").write_text('{"changed": true}')
    (model / "training_args.bin").write_bytes(b"x")
    (model / "pytorch_model.bin").write_bytes(b"vLLM prefers safetensors")
    assert identify(model, tmp_path / "cache") == before


def test_every_shard_and_the_index_count(model: Path, tmp_path: Path) -> None:
    digests = [identify(model, tmp_path / "cache").digest]
    (model / "model-2.safetensors").write_bytes(b"more")
    digests.append(identify(model, tmp_path / "cache").digest)
    (model / "model.safetensors.index.json").write_text("{}")
    digests.append(identify(model, tmp_path / "cache").digest)
    assert len(set(digests)) == 3


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.gguf"])
def test_other_kinds_of_weights_are_read_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(b"weights")
    found = identify(tmp_path / "model", tmp_path / "cache")
    assert found.verified
    assert identify(tmp_path / "model" / name, tmp_path / "cache") == found


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"config": {**CONFIG, "rope_theta": 10000.0}},
        {"config": {**CONFIG, "sliding_window": 4096}},
        {"config": {**CONFIG, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
        {"config": {**CONFIG, "attention_multiplier": 0.5}},
        {"load_format": "dummy"},
    ],
)
def test_what_changes_the_computation_counts(
    change: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert identify(model, cache, **change).digest != identify(model, cache).digest


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "torch.bfloat16"},
        {"seed": 7},
        {"revision": "main"},
        {"load_format": "safetensors"},
        {"config": {**CONFIG, "transformers_version": "9", "_name_or_path": "/x", "dtype": "x"}},
        {"config": {**CONFIG, "bos_token_id": 7, "use_cache": False, "new_option": None}},
        {"config": dict(reversed(CONFIG.items()))},
    ],
)
def test_what_does_not_change_the_computation_does_not_count(
    change: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert identify(model, cache, **change).digest == identify(model, cache).digest


def test_dummy_weights_are_told_apart_by_their_seed(tmp_path: Path) -> None:
    first, second, third = (
        identify("any/model", tmp_path, load_format="dummy", seed=seed) for seed in (1, 2, 1)
    )
    assert first == third
    assert first.digest != second.digest
    assert first.weights == "dummy:1"


def test_weights_that_are_not_here_are_named_and_flagged(tmp_path: Path) -> None:
    found = identify("nobody/has-this-model", tmp_path, revision="v2")
    assert found.weights == "unverified:nobody/has-this-model@v2"
    assert not found.verified
    assert found.digest != identify("nobody/has-this-model", tmp_path, revision="v3").digest


def test_an_empty_folder_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert not identify(tmp_path / "model", tmp_path / "cache").verified


def test_a_second_start_reads_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identify(model, tmp_path / "cache")
    real, read = module.blake3, []

    class Counting:
        AUTO = real.AUTO

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            read.append(kwargs)
            return real(*args, **kwargs)

    monkeypatch.setattr(module, "blake3", Counting)
    assert identify(model, tmp_path / "cache") == before
    assert not [options for options in read if "max_threads" in options]
    (tmp_path / "cache").rename(tmp_path / "away")
    assert identify(model, tmp_path / "cache") == before
    assert [options for options in read if "max_threads" in options]


def test_a_damaged_memory_of_digests_is_read_past(model: Path, tmp_path: Path) -> None:
    before = identify(model, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    for damage in ("", "{", "[]", '{"identity": 1}'):
        entry.write_text(damage)
        assert identify(model, tmp_path / "cache") == before
    assert json.loads(entry.read_text())["blake3"]


def test_a_cache_that_cannot_be_written_costs_only_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = identify(model, tmp_path / "file")
    assert found == identify(model, tmp_path / "cache")


def test_rope_is_the_same_in_both_ways_of_writing_it() -> None:
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1000000}}
    assert relevant_config(old) == relevant_config(new)
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert relevant_config({"rope_theta": 10000, "rope_scaling": None}) == relevant_config(plain)


def test_rope_of_each_layer_kind_counts() -> None:
    def config(local: float) -> dict[str, Any]:
        sliding = {"rope_type": "default", "rope_theta": local}
        return relevant_config({"rope_parameters": {"full": {"rope_theta": 1e6}, "slide": sliding}})

    assert config(1e4) != config(2e4)


def test_nested_configurations_are_cleaned_but_quantization_is_kept_whole() -> None:
    nested = {"text_config": {"dtype": "float16", "hidden_size": 8}}
    assert relevant_config(nested) == {"text_config": {"hidden_size": 8}}
    quantised = {"quantization_config": {"dtype": "int8"}}
    assert relevant_config(quantised) == quantised


def test_an_implied_head_dimension_equals_a_written_one() -> None:
    assert relevant_config(CONFIG) == relevant_config({**CONFIG, "head_dim": 64})


def test_a_numerics_class_is_one_stable_line() -> None:
    assert str(NUMERICS) == (
        "device=cpu;isa=amx;tensor_parallel=1;pipeline_parallel=1;attention_backend=cpu_attn;"
        "kv_dtype=bfloat16;model_dtype=bfloat16;scales=;artifact_dtype=exact"
    )


def test_kv_of_fp8_caches_is_only_alike_under_the_same_format_and_scales() -> None:
    exact, scaled = str(NUMERICS), replace(NUMERICS, kv_dtype="fp8", scales="checkpoint")
    other_device = str(replace(NUMERICS, device="cuda", kv_dtype="float16"))
    assert same_kv_scale(exact, other_device)
    assert same_kv_scale(str(scaled), str(replace(scaled, kv_dtype="fp8_e4m3", device="cuda")))
    assert not same_kv_scale(exact, str(scaled))
    assert not same_kv_scale(str(scaled), str(replace(scaled, kv_dtype="fp8_e5m2")))
    assert same_kv_scale("cpu", "gpu")
