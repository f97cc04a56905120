"""Keys that are turned to another position are the keys that the model makes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from memos_vllm_kernels import KernelInputError
from memos_vllm_kernels.rotary import RotaryTable, rotate_keys

HEADS, TOKENS = 3, 17
# One rounding of the result, and float32's own error in an angle of some thousand radians.
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2**-8, "atol": 4e-3},
    torch.float16: {"rtol": 2**-11, "atol": 2e-3},
}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10_000.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 500_000.0,
    },
}


def model_rotary(style: str, scaling: str) -> tuple[Any, Any]:
    """transformers' own rotary module and apply function of a model family."""
    parameters = dict(SCALINGS[scaling])
    if style == "llama":
        config = LlamaConfig(
            hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters
        )
        return modeling_llama.LlamaRotaryEmbedding(config), modeling_llama.apply_rotary_pos_emb
    if style == "qwen3":
        config = Qwen3Config(
            hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=parameters
        )
        return modeling_qwen3.Qwen3RotaryEmbedding(config), modeling_qwen3.apply_rotary_pos_emb
    parameters["partial_rotary_factor"] = 0.25
    config = GPTNeoXConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    return modeling_gpt_neox.GPTNeoXRotaryEmbedding(config), modeling_gpt_neox.apply_rotary_pos_emb


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("scaling", list(SCALINGS))
@pytest.mark.parametrize("style", ["llama", "qwen3", "gpt_neox"])
def test_turned_keys_are_those_that_transformers_computes_at_the_new_position(
    style: str, scaling: str, dtype: torch.dtype
) -> None:
    rotary, apply = model_rotary(style, scaling)
    dim = 128 if style == "qwen3" else 64
    generator = torch.Generator().manual_seed(5)
    raw = torch.randn((1, HEADS, TOKENS, dim), generator=generator)
    old = torch.arange(TOKENS)[None] + 40
    new = old + torch.randint(-40, 2000, (1, TOKENS), generator=generator)

    def keys_at(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary(raw, positions)
        keys: torch.Tensor = apply(raw, raw, cos, sin)[1]
        return keys[0].transpose(0, 1)

    table = RotaryTable.of(rotary.inv_freq)
    turned = rotate_keys(keys_at(old).to(dtype), (new - old)[0], table)
    assert turned.dtype == dtype
    # What rounding does to the keys before they are turned is not the turning's error.
    spread = keys_at(old).to(dtype).float() - keys_at(old)
    slack = {**TOLERANCE[dtype]}
    slack["atol"] += 2 * float(spread.abs().max())
    torch.testing.assert_close(turned.float(), keys_at(new), **slack)


def test_interleaved_pairs_turn_as_complex_numbers_do() -> None:
    keys = torch.randn((TOKENS, HEADS, 64), generator=torch.Generator().manual_seed(1))
    table = RotaryTable.of(10_000.0 ** -(torch.arange(0, 48, 2) / 48), interleaved=True)
    deltas = torch.arange(TOKENS) * 7 - 30
    angles = deltas[:, None, None].double() * torch.tensor(table.inverse_frequencies).double()
    numbers = torch.view_as_complex(keys[..., :48].double().unflatten(-1, (24, 2)))
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles))
    turned = rotate_keys(keys, deltas, table)
    torch.testing.assert_close(turned[..., :48], expected.flatten(-2).float(), rtol=0, atol=1e-4)
    assert torch.equal(turned[..., 48:], keys[..., 48:])


@settings(max_examples=40, deadline=None)
@given(
    first=st.integers(-4000, 4000),
    second=st.integers(-4000, 4000),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_turning_twice_is_turning_by_the_sum(
    first: int, second: int, interleaved: bool, seed: int
) -> None:
    table = RotaryTable.of(10_000.0 ** -(torch.arange(0, 64, 2) / 64), interleaved=interleaved)
    keys = torch.randn((5, 2, 64), generator=torch.Generator().manual_seed(seed))

    def by(delta: int, of: torch.Tensor) -> torch.Tensor:
        return rotate_keys(of, torch.full((5,), delta), table)

    torch.testing.assert_close(by(second, by(first, keys)), by(first + second, keys), **LOOSE)
    torch.testing.assert_close(by(-first, by(first, keys)), keys, **LOOSE)


LOOSE = {"rtol": 0.0, "atol": 5e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_no_difference_changes_no_bit(dtype: torch.dtype) -> None:
    keys = torch.randn((TOKENS, HEADS, 64)).to(dtype)
    table = RotaryTable.of(torch.rand(32))
    assert torch.equal(rotate_keys(keys, torch.zeros(TOKENS, dtype=torch.int64), table), keys)


def test_long_and_strided_keys_turn_in_place_and_out_of_place_alike() -> None:
    wide = torch.randn((4000, 2, 3, 64))
    keys = wide[:, 1]
    before, deltas = keys.clone(), torch.arange(4000) - 900
    table = RotaryTable.of(10_000.0 ** -(torch.arange(0, 64, 2) / 64))
    out = torch.full((4000, 3, 64), float("nan"))
    assert rotate_keys(keys, deltas, table, out=out) is out
    assert torch.equal(keys, before), "only out may change"
    assert torch.equal(out[1234:1235], rotate_keys(keys[1234:1235], deltas[1234:1235], table))
    rotate_keys(keys, deltas, table, out=keys)
    assert torch.equal(keys, out)
    assert rotate_keys(keys[:0], deltas[:0], table).shape == (0, 3, 64)


@pytest.mark.parametrize(
    ("keys", "deltas", "message"),
    [
        (torch.zeros(4, 2, 16), torch.zeros(4, dtype=torch.int64), "32 dims are to be turned"),
        (torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), "expected floats"),
        (torch.zeros(4, 2, 64, dtype=torch.int16), torch.zeros(4).long(), "expected floats"),
        (torch.zeros(4, 2, 64), torch.zeros(3, dtype=torch.int64), "expected integers"),
        (torch.zeros(4, 2, 64), torch.zeros(4), "expected integers"),
    ],
)
def test_what_cannot_be_turned_is_refused(
    keys: torch.Tensor, deltas: torch.Tensor, message: str
) -> None:
    with pytest.raises(KernelInputError, match=message):
        rotate_keys(keys, deltas, RotaryTable.of(torch.rand(16)))


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([float("nan")])])
def test_a_table_that_is_no_table_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(KernelInputError, match="finite vector"):
        RotaryTable.of(bad)
