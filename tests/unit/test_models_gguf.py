"""A GGUF file becomes a folder with the same weights and the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memos_vllm.errors import ConfigurationError
from memos_vllm.models.gguf_import import WRITTEN_FILES, import_gguf

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 2, 1, 4, 8
BYTES = [chr(c) for c in (*range(0x21, 0x7F), 0x120, 0x10A)]  # 0x120 and 0x10A: space, newline
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "hi", "ĠĠ"]


def write_gguf(path: Path, *, architecture: str = "llama") -> np.ndarray[Any, Any]:
    """Write a one-layer model; gives the q projection in the order of transformers."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(16)
    writer.add_context_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_block_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["h i", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(0)
    query = rng.normal(size=(HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.ffn_up.weight": (16, HIDDEN),
    }
    # llama.cpp stores each head's rows as 0, half, 1, half + 1, ...
    halves = query.reshape(HEADS, 2, HEAD_DIM // 2, HIDDEN)
    interleaved = np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(query.shape))
    writer.add_tensor("blk.0.attn_q.weight", interleaved)
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return query


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray[Any, Any]]:
    folder = tmp_path_factory.mktemp("gguf")
    query = write_gguf(folder / "model.gguf")
    (folder / "out").mkdir()
    import_gguf(folder / "model.gguf", folder / "out")
    return folder / "out", query


def test_every_promised_file_is_written(converted: tuple[Path, Any]) -> None:
    assert {file.name for file in converted[0].iterdir()} == set(WRITTEN_FILES)


def test_weights_come_in_bfloat16_under_the_names_and_order_of_transformers(
    converted: tuple[Path, np.ndarray[Any, Any]],
) -> None:
    from safetensors.torch import load_file

    weights = load_file(converted[0] / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "model.layers.0.mlp.up_proj.weight" in weights
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(query, torch.from_numpy(converted[1]).to(torch.bfloat16))


def test_the_configuration_is_that_of_the_file(converted: tuple[Path, Any]) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-05
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_the_tokenizer_splits_digits_before_spaces_merge(converted: tuple[Path, Any]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    said = tokenizer.encode("hi  12<|im_end|>").tokens
    assert said == ["hi", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("hi  12").ids) == "hi  12"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", architecture="qwen2")
    with pytest.raises(ConfigurationError, match="not a Llama model"):
        import_gguf(tmp_path / "model.gguf", tmp_path)
