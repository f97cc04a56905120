"""Small models with random weights that the CPU build of vLLM serves, for server tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

Kind = Literal["llama", "qwen3", "gemma2", "mistral"]

TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
_TEMPLATE_OF: dict[Kind, str] = {
    "llama": "smollm2",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "mistral": "mistral",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tiny_model(
    kind: Kind,
    path: Path,
    *,
    tokenizer: Path,
    head_dim: Literal[32, 64, 80, 96, 128] = 64,
    layers: int = 4,
    max_position_embeddings: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a model folder, bfloat16, about 10 MB, and return `path`.

    Args:
        kind: "mistral" has a sliding window in every layer, "gemma2" in every other one.
        tokenizer: a folder prepared from smollm2-135m-instruct, whose tokenizer is copied; the
            chat template is that of `kind`.
        head_dim: what vLLM's CPU attention supports. Two KV heads, four query heads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    config = _config(kind, head_dim=head_dim, layers=layers, positions=max_position_embeddings)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    for file in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / file, path / file)
    _set_template(path, (TEMPLATES / f"{_TEMPLATE_OF[kind]}.jinja").read_text(encoding="utf-8"))
    return path


def _config(kind: Kind, *, head_dim: int, layers: int, positions: int) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        # Wide enough that greedy tokens are seldom near-ties.
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if kind == "llama":
        return transformers.LlamaConfig(**common)
    if kind == "qwen3":
        return transformers.Qwen3Config(**common)
    if kind == "mistral":
        return transformers.MistralConfig(**common, sliding_window=512)
    return transformers.Gemma2Config(
        **common,
        sliding_window=512,
        query_pre_attn_scalar=head_dim,
        hidden_activation="gelu_pytorch_tanh",
    )


def _set_template(path: Path, template: str) -> None:
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
