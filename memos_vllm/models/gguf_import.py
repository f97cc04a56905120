"""Turn a Llama-shaped GGUF file into a model folder that vLLM and transformers load.

Read with the `gguf` package and written with `tokenizers` and `safetensors`: transformers can do
the same only with `accelerate` installed, and it leaves out the digit splitting of the SmolLM
tokenizer (`tokenizer.ggml.pre` is "smollm"), so that double spaces before digits tokenize
differently from the published model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memos_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from tokenizers import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
WRITTEN_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    WEIGHTS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    TEMPLATE_FILE,
)

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def import_gguf(source: Path, folder: Path) -> None:
    """Write the model in `source` into the existing, empty `folder`, weights in bfloat16.

    Raises:
        ConfigurationError: `gguf` is not installed, or the file is not a Llama model with a
            byte-level BPE tokenizer.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigurationError(
            "reading a GGUF file needs the gguf package: pip install 'memos-vllm[models]'"
        ) from error
    reader = GGUFReader(source)
    if _read(reader, "general.architecture") != "llama":
        raise ConfigurationError(f"{source.name} is not a Llama model; only those are converted")
    if _read(reader, "tokenizer.ggml.model") != "gpt2":
        raise ConfigurationError(f"{source.name} has no byte-level BPE tokenizer")
    _write_json(folder / CONFIG_FILE, _model_config(reader))
    _write_json(folder / GENERATION_FILE, _token_ids(reader))
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder / WEIGHTS_FILE)


def _read(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ConfigurationError(f"the GGUF file lacks the field {key}")
    return field.contents()


def _token_ids(reader: GGUFReader) -> dict[str, int]:
    return {
        "bos_token_id": _read(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _read(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _read(reader, "tokenizer.ggml.padding_token_id"),
    }


def _model_config(reader: GGUFReader) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": _read(reader, "llama.embedding_length"),
        "intermediate_size": _read(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _read(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": _read(reader, "llama.attention.head_count"),
        "num_hidden_layers": _read(reader, "llama.block_count"),
        "num_key_value_heads": _read(reader, "llama.attention.head_count_kv"),
        # GGUF keeps it in float32: 9.999999747378752e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{_read(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": _read(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": _read(reader, "llama.vocab_size"),
        **_token_ids(reader),
    }


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = _read(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _read(reader, "tokenizer.ggml.token_type")
    merges = [tuple(line.split(" ", 1)) for line in _read(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: rank for rank, token in enumerate(tokens)}, merges=merges)
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if _read(reader, "tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    tokenizer = _tokenizer(reader)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    named = {
        "bos_token": tokenizer.id_to_token(_read(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token": tokenizer.id_to_token(_read(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token": tokenizer.id_to_token(_read(reader, "tokenizer.ggml.padding_token_id")),
        "unk_token": tokenizer.id_to_token(_read(reader, "tokenizer.ggml.unknown_token_id")),
    }
    template = _read(reader, "tokenizer.chat_template")
    _write_json(
        folder / TOKENIZER_CONFIG_FILE,
        {
            **named,
            "additional_special_tokens": sorted({named["bos_token"], named["eos_token"]}),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _read(reader, "llama.context_length"),
            "tokenizer_class": "PreTrainedTokenizerFast",
            # In both places: transformers before 4.43 reads only this one.
            "chat_template": template,
        },
    )
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _write_weights(reader: GGUFReader, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {
        name: torch.from_numpy(values).to(torch.bfloat16) for name, values in _tensors(reader)
    }
    save_file(weights, path, metadata={"format": "pt"})


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield (Hugging Face name, float32 values) of every tensor."""
    import numpy as np
    from gguf import dequantize

    heads = {
        "attn_q": _read(reader, "llama.attention.head_count"),
        "attn_k": _read(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        # A copy: unquantised tensors come as read-only views of the file.
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name in _OUTER_TENSORS:
            yield _OUTER_TENSORS[tensor.name], values
            continue
        parts = tensor.name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_TENSORS:
            raise ConfigurationError(f"the GGUF file has an unknown tensor {tensor.name}")
        if parts[2] in heads:
            values = _rotate_half_order(values, heads[parts[2]])
        name = f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.{parts[3]}"
        yield name, np.ascontiguousarray(values)


def _rotate_half_order(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's row order: it pairs neighbours for RoPE, transformers pairs halves.

    Args:
        values: [num_heads * head_dim, hidden], rows of each head as (head_dim / 2, 2).
    """
    half = values.shape[0] // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
