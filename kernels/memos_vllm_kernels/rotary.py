"""Turning keys to other positions.

A key that RoPE turned to position p is turned on to p + delta by RoPE with delta alone, since
rotations of the same plane add up. So KV that was computed at one place in a prompt can be used at
another: keys are turned, values hold no position.

This module is the plain torch truth. Numbers are turned in float32 and rounded
once, to nearest even, into the keys' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memos_vllm_kernels.errors import KernelInputError


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """How a model turns its keys.

    Scaled variants (linear, NTK, YaRN, Llama 3) are other frequencies and nothing else: a factor on
    cosine and sine, as YaRN has, is in the keys already and is left there.

    Attributes:
        inverse_frequencies: radians a position, one for each pair of dims.
        interleaved: pairs are dims (0, 1), (2, 3), ... as in GPT-J; otherwise dim i is paired with
            i + rotary_dim / 2, as in GPT-NeoX and Llama.
        first_dim: where in a head the dims that are turned begin; MLA keeps them behind its latent.
    """

    inverse_frequencies: tuple[float, ...]
    interleaved: bool = False
    first_dim: int = 0

    @classmethod
    def of(
        cls,
        inverse_frequencies: torch.Tensor | Sequence[float],
        *,
        interleaved: bool = False,
        first_dim: int = 0,
    ) -> RotaryTable:
        """From a model's own table.

        Raises:
            KernelInputError: the table is empty, not one-dimensional or not finite.
        """
        if first_dim < 0:
            raise KernelInputError(f"dims are counted from 0, got {first_dim}")
        table = torch.as_tensor(inverse_frequencies, dtype=torch.float32)
        if table.dim() != 1 or not len(table) or not bool(torch.isfinite(table).all()):
            raise KernelInputError(
                f"inverse frequencies must be a finite vector, got shape {tuple(table.shape)}"
            )
        return cls(tuple(table.tolist()), interleaved, first_dim)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dims are turned; the others carry no position."""
        return 2 * len(self.inverse_frequencies)

    @property
    def dims(self) -> slice:
        """Those that are turned."""
        return slice(self.first_dim, self.first_dim + self.rotary_dim)


@dataclass(frozen=True, slots=True)
class Rotation:
    """By how much each token's keys are turned.

    Attributes:
        deltas: [tokens] int64 or int32; new position minus old one.
    """

    deltas: torch.Tensor
    table: RotaryTable

    def check(self, *, num_tokens: int, head_dim: int, device: torch.device) -> None:
        """Raise KernelInputError when it cannot turn keys [num_tokens, kv_heads, head_dim]."""
        deltas, end = self.deltas, self.table.dims.stop
        if end > head_dim:
            raise KernelInputError(f"{end} dims are to be turned, a head has {head_dim}")
        if tuple(deltas.shape) != (num_tokens,) or deltas.dtype not in (torch.int64, torch.int32):
            raise KernelInputError(
                f"deltas are {deltas.dtype} {tuple(deltas.shape)}, "
                f"expected integers {(num_tokens,)}"
            )
        if deltas.device != device:
            raise KernelInputError(f"deltas are on {deltas.device}, the keys on {device}")

    def angles(self) -> Angles:
        """In float64 until they are rounded once: in float32, 100,000 radians are off by 0.004."""
        table = torch.tensor(
            self.table.inverse_frequencies, dtype=torch.float64, device=self.deltas.device
        )
        radians = self.deltas.to(torch.float64)[:, None] * table
        return Angles(radians.cos().to(torch.float32), radians.sin().to(torch.float32), self.table)


@dataclass(frozen=True, slots=True)
class Angles:
    """A rotation worked out, for all layers and heads.

    Attributes:
        cosines, sines: [tokens, rotary_dim / 2] float32, contiguous.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    table: RotaryTable

    def check(self, *, num_tokens: int, head_dim: int, device: torch.device) -> None:
        """Raise KernelInputError when they cannot turn keys [num_tokens, kv_heads, head_dim]."""
        shape, end = (num_tokens, self.table.rotary_dim // 2), self.table.dims.stop
        for values in (self.cosines, self.sines):
            if values.shape != shape or values.device != device or end > head_dim:
                raise KernelInputError(
                    f"angles of {tuple(values.shape)} on {values.device} for dims up to {end}, "
                    f"expected {shape} on {device} and a head of {head_dim}"
                )

    def of_tokens(self, tokens: slice) -> Angles:
        return Angles(self.cosines[tokens], self.sines[tokens], self.table)


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
    if keys.dim() != 3 or not keys.is_floating_point():
        raise KernelInputError(
            f"keys are {keys.dtype} {tuple(keys.shape)}, expected floats [tokens, heads, dim]"
        )
    rotation = Rotation(deltas, table)
    rotation.check(num_tokens=len(keys), head_dim=keys.shape[2], device=keys.device)
    if out is None:
        out = torch.empty_like(keys, memory_format=torch.contiguous_format)
    if out.shape != keys.shape or out.device != keys.device or not out.is_floating_point():
        raise KernelInputError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"the keys are {tuple(keys.shape)} on {keys.device}"
        )
    return out.copy_(turn(keys.to(torch.float32, copy=True), rotation.angles()))


def turn(numbers: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Turn keys in place. Checks nothing.

    Args:
        numbers: [tokens, kv_heads, head_dim] float32, mutated.
    Returns:
        `numbers`.
    """
    cos, sin = angles.cosines[:, None], angles.sines[:, None]
    turned = numbers[..., angles.table.dims]
    if angles.table.interleaved:
        left, right = turned[..., 0::2], turned[..., 1::2]
    else:
        left, right = turned.chunk(2, dim=-1)
    new_left = left * cos - right * sin
    right.mul_(cos).add_(left * sin)
    left.copy_(new_left)
    return numbers
