"""Turning keys to other positions.

A key that RoPE turned to position p is turned on to p + delta by RoPE with delta alone, since
rotations of the same plane add up. So KV that was computed at one place in a prompt can be used at
another: keys are turned, values hold no position.

This module is the plain torch truth and the CPU path. Numbers are turned in float32 and rounded
once, to nearest even, into the keys' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memos_vllm_kernels.errors import KernelInputError

# Converted to float32 in pieces that stay in a core's L2 cache.
_PIECE_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """How a model turns its keys.

    Scaled variants (linear, NTK, YaRN, Llama 3) are other frequencies and nothing else: a factor on
    cosine and sine, as YaRN has, is in the keys already and is left there.

    Attributes:
        inverse_frequencies: radians a position, one for each pair of dims.
        interleaved: pairs are dims (0, 1), (2, 3), ... as in GPT-J; otherwise dim i is paired with
            i + rotary_dim / 2, as in GPT-NeoX and Llama.
    """

    inverse_frequencies: tuple[float, ...]
    interleaved: bool = False

    @classmethod
    def of(
        cls, inverse_frequencies: torch.Tensor | Sequence[float], *, interleaved: bool = False
    ) -> RotaryTable:
        """From a model's own table.

        Raises:
            KernelInputError: the table is empty, not one-dimensional or not finite.
        """
        table = torch.as_tensor(inverse_frequencies, dtype=torch.float32)
        if table.dim() != 1 or not len(table) or not bool(torch.isfinite(table).all()):
            raise KernelInputError(
                f"inverse frequencies must be a finite vector, got shape {tuple(table.shape)}"
            )
        return cls(tuple(table.tolist()), interleaved)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's first dims are turned; the others carry no position."""
        return 2 * len(self.inverse_frequencies)


@dataclass(frozen=True, slots=True)
class Rotation:
    """By how much each token's keys are turned.

    Attributes:
        deltas: [tokens] int64 or int32; new position minus old one.
    """

    deltas: torch.Tensor
    table: RotaryTable


def rotate_keys(
    keys: torch.Tensor,
    deltas: torch.Tensor,
    table: RotaryTable,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn each token's keys by its own difference of positions.

    Args:
        keys: [tokens, kv_heads, head_dim], any float dtype and strides; not changed unless it is
            `out`.
        deltas: [tokens] int64 or int32 on the keys' device; new position minus old one.
        out: [tokens, kv_heads, head_dim] in any float dtype, mutated; may be `keys`.
    Returns:
        `out`, or a new tensor of the keys' dtype.
    Raises:
        KernelInputError: wrong shape, dtype or device, or fewer dims than are turned.
    """
    check_rotation(keys, deltas, table)
    return turn_keys(keys, rotation_tables(deltas, table), table, out=out)


def turn_keys(
    keys: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    table: RotaryTable,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotate_keys` for many layers that share their `rotation_tables`; checks only `out`."""
    if out is None:
        out = torch.empty_like(keys, memory_format=torch.contiguous_format)
    if out.shape != keys.shape or out.device != keys.device or not out.is_floating_point():
        raise KernelInputError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"the keys are {tuple(keys.shape)} on {keys.device}"
        )
    if len(keys) == 0:
        return out
    cos, sin = tables
    step = max(1, _PIECE_NUMBERS // (keys.shape[1] * keys.shape[2]))
    for first in range(0, len(keys), step):
        piece = slice(first, first + step)
        numbers = keys[piece].to(torch.float32, copy=True)
        turned = _turn(numbers, cos[piece, None], sin[piece, None], table)
        out[piece] = turned.to(out.dtype)
    return out


def rotation_tables(deltas: torch.Tensor, table: RotaryTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle by which each token's pairs are turned.

    In float64 until they are rounded once: in float32 an angle of 100,000 radians is off by 0.004.

    Args:
        deltas: [tokens] integers.
    Returns:
        [tokens, rotary_dim / 2] float32 each, contiguous, on the device of `deltas`.
    """
    frequencies = torch.tensor(table.inverse_frequencies, dtype=torch.float64, device=deltas.device)
    angles = deltas.to(torch.float64)[:, None] * frequencies
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def check_rotation(keys: torch.Tensor, deltas: torch.Tensor, table: RotaryTable) -> None:
    """Raise KernelInputError when these keys cannot be turned by these differences."""
    if keys.dim() != 3 or not keys.is_floating_point():
        raise KernelInputError(
            f"keys are {keys.dtype} {tuple(keys.shape)}, expected floats [tokens, heads, dim]"
        )
    if table.rotary_dim > keys.shape[2]:
        raise KernelInputError(
            f"{table.rotary_dim} dims are to be turned, a head has {keys.shape[2]}"
        )
    wanted = (len(keys),)
    if tuple(deltas.shape) != wanted or deltas.dtype not in (torch.int64, torch.int32):
        raise KernelInputError(
            f"deltas are {deltas.dtype} {tuple(deltas.shape)}, expected integers {wanted}"
        )
    if deltas.device != keys.device:
        raise KernelInputError(f"deltas are on {deltas.device}, the keys on {keys.device}")


def _turn(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, table: RotaryTable
) -> torch.Tensor:
    """Turn float32 keys in place; cos and sin are [tokens, 1, rotary_dim / 2]."""
    turned = keys[..., : table.rotary_dim]
    if table.interleaved:
        left, right = turned[..., 0::2], turned[..., 1::2]
    else:
        left, right = turned.chunk(2, dim=-1)
    new_left = left * cos - right * sin
    right.mul_(cos).add_(left * sin)
    left.copy_(new_left)
    return keys
