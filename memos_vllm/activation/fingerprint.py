"""What makes two servers' KV interchangeable: the model's fingerprint and the numerics class.

The fingerprint says that two servers run the same function of token ids: the same weights (by
content), the same configuration, dtype and quantization. It holds no path, no host and no version
of vLLM, and nothing of the tokenizer, because artifacts are matched by token ids.

The numerics class says that they round alike: device, instruction set, parallel layout, attention
backend and the dtypes of model and cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blake3 import blake3

logger = logging.getLogger(__name__)

# Moves when the digest of the same model is computed differently; old artifacts are recomputed.
_FINGERPRINT_FORMAT = 1

# In the order in which vLLM prefers them; the first kind that is there is what it loads.
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_PATTERNS_OF_FORMAT = {
    "safetensors": ("*.safetensors",),
    "pt": ("*.bin", "*.pt", "*.pth"),
    "npcache": ("*.bin", "*.pt", "*.pth"),
    "gguf": ("*.gguf",),
}
# Left behind by training, never loaded for serving.
_NOT_WEIGHTS = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
)

# Everything else in a model's configuration counts: an unknown key can only cost a rebuild.
_IRRELEVANT_CONFIG = frozenset(
    {
        *("transformers_version", "name_or_path", "tokenizer_class"),
        *("dtype", "torch_dtype", "use_cache", "return_dict", "gradient_checkpointing"),
        *("output_attentions", "output_hidden_states", "use_return_dict", "torchscript"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
        *("dropout", "initializer_range", "is_llama_config", "pretraining_tp"),
        *("attn_implementation", "chunk_size_feed_forward"),
    }
)
_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of a served model.

    Args:
        digest: 64 hex digits over all of `detail`; equal means interchangeable.
        weights: the weights' part: "blake3:<hex>", "dummy:<seed>" or "unverified:<id>@<revision>".
        detail: what went into the digest, as JSON values.
        verified: False when the weights could not be read here, so that only their name is known.
    """

    digest: str
    weights: str
    detail: dict[str, Any]
    verified: bool = True


@dataclass(frozen=True, slots=True)
class NumericsClass:
    """How a server rounds; artifacts of another class are recomputed unless allowed.

    Args:
        isa: the CPU attention's packing ("amx", "vec", ...) or the GPU's architecture ("sm_90").
        kv_dtype: dtype of the KV cache, with "auto" resolved.
        scales: where the scales of a quantised cache come from: "checkpoint", of which the
            fingerprint knows the content, or "none".
        artifact_dtype: how artifacts are written; smaller ones come back rounded otherwise.
    """

    device: str
    isa: str
    tensor_parallel: int
    pipeline_parallel: int
    attention_backend: str
    kv_dtype: str
    model_dtype: str
    scales: str = ""
    artifact_dtype: str = "exact"

    def __str__(self) -> str:
        """One stable line, `device=cpu;isa=amx;...`, with every field."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ";".join(f"{name}={_plain(str(value))}" for name, value in values)


def same_kv_scale(left: str, right: str) -> bool:
    """Whether KV of two numerics classes holds the same numbers but for rounding.

    An fp8 cache holds them divided by scales, and its bytes do not say which fp8 they are.
    """
    kinds = []
    for numerics in (left, right):
        found = dict(part.split("=", 1) for part in numerics.split(";") if "=" in part)
        dtype = found.get("kv_dtype", "")
        is_fp8 = dtype.startswith("fp8")
        kind = "fp8_e4m3" if dtype == "fp8" else dtype
        kinds.append((kind, found.get("scales", "")) if is_fp8 else ("unscaled", ""))
    return kinds[0] == kinds[1]


def model_fingerprint(
    model: str | Path,
    *,
    revision: str | None,
    dtype: str,
    config: Mapping[str, Any],
    quantization: str | None,
    load_format: str,
    seed: int,
    cache_dir: Path,
) -> Fingerprint:
    """Identify the model that a server runs.

    Args:
        model: a folder, a GGUF file, or a hub id whose snapshot is in the hub's local cache.
        revision: of a hub id.
        dtype: the model's dtype with "auto" resolved, such as "bfloat16".
        config: the configuration in use, overrides included (`PretrainedConfig.to_dict()`).
        load_format: vLLM's; "dummy" means random weights made from `seed`.
        cache_dir: where digests of weight files are remembered, made if missing.
    """
    if load_format == "dummy":
        weights, verified = f"dummy:{seed}", True
    else:
        found = _weights_digest(model, revision, load_format, cache_dir)
        weights = f"blake3:{found}" if found else f"unverified:{model}@{revision or 'main'}"
        verified = found is not None
    detail = {
        "format": _FINGERPRINT_FORMAT,
        "weights": weights,
        "dtype": _plain(dtype).removeprefix("torch."),
        "quantization": _plain(quantization or "none"),
        "config": relevant_config(config),
    }
    return Fingerprint(_digest_of(detail), weights, detail, verified)


def relevant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that changes what the model computes, normalised.

    Keys without effect, private keys and None values go, in nested configurations too; the ways
    of writing RoPE become one; whole floats become integers.
    """
    kept: dict[str, Any] = {
        key: _canonical(value) if key == "quantization_config" else _normalised(value)
        for key, value in config.items()
        if value is not None
        and key not in _IRRELEVANT_CONFIG
        and key not in _ROPE_KEYS
        and not key.startswith("_")
    }
    rope = _rope(config)
    if rope:
        kept["rope"] = _canonical(rope)
    hidden, heads = kept.get("hidden_size"), kept.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        kept.setdefault("head_dim", hidden // heads)
    return kept


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as one mapping: transformers 5 writes `rope_parameters`, 4 theta and scaling apart."""
    theta = config.get("rope_theta")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        # One mapping for each kind of layer.
        return rope if theta is None else {**rope, "rope_theta": theta}
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    old_name = rope.pop("type", None)
    if rope or old_name:
        rope.setdefault("rope_type", old_name or "default")
    return rope


def _normalised(value: object) -> object:
    if isinstance(value, Mapping):
        return relevant_config({str(key): inner for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return [_normalised(inner) for inner in value]
    return _canonical(value)


def _canonical(value: object) -> object:
    """The value as JSON values, nothing left out."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(str(inner) for inner in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return str(value)


def _weights_digest(
    model: str | Path, revision: str | None, load_format: str, cache_dir: Path
) -> str | None:
    """BLAKE3 over the names and contents of the weight files; None when they cannot be read."""
    files = _weight_files(model, revision, load_format)
    if not files:
        return None
    try:
        return _digest_of({file.name: _file_digest(file, cache_dir) for file in files})
    except OSError as error:
        logger.warning("cannot read the weights of %s, so only its name counts: %s", model, error)
        return None


def _weight_files(model: str | Path, revision: str | None, load_format: str) -> list[Path]:
    folder = _local_folder(model, revision)
    if folder is None:
        return []
    if folder.is_file():
        return [folder]
    for pattern in _PATTERNS_OF_FORMAT.get(load_format, _WEIGHT_PATTERNS):
        files = sorted(file for file in folder.glob(pattern) if file.name not in _NOT_WEIGHTS)
        if files:
            # The index says which shards count, so it is part of what is loaded.
            return [*files, *sorted(folder.glob(f"{pattern}.index.json"))]
    return []


def _local_folder(model: str | Path, revision: str | None) -> Path | None:
    path = Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(str(model), "config.json", revision=revision)
    except ValueError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _file_digest(file: Path, cache_dir: Path) -> str:
    """The content's digest, remembered by everything that moves when the content does."""
    real = file.resolve(strict=True)
    identity = _identity(real)
    entry = cache_dir / f"{blake3(os.fsencode(real)).hexdigest(16)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return str(known["blake3"])
    digest = blake3(max_threads=blake3.AUTO).update_mmap(real).hexdigest()
    # A file that changed while it was read has no digest worth keeping.
    if _identity(real) == identity:
        _remember(entry, {"identity": identity, "blake3": digest})
    return digest


def _identity(file: Path) -> dict[str, object]:
    # ctime as well as mtime: a copy tool may set mtime back, nothing sets ctime back.
    stat = file.stat()
    return {
        "path": str(file),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def _remember(entry: Path, content: Mapping[str, object]) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=entry.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(content, file)
        Path(file.name).replace(entry)
    except OSError as error:
        logger.warning("weights will be read again at the next start: %s", error)


def _digest_of(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake3(canonical.encode()).hexdigest()


def _plain(value: str) -> str:
    """Lower case, with what separates fields taken out."""
    return value.strip().lower().replace(";", "_").replace("=", "_")
