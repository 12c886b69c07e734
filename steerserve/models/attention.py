"""Full attention that gives a row the same bits on a canvas of any width."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

TILE: Final = 16
"""CPU kernels split queries and keys by this; at multiples of it a row's bits do not depend on what it is padded to."""


def padding_mask(lengths: Tensor | None, width: int, device: torch.device) -> Tensor | None:
    """Attention mask [rows or 1, 1, 1, keys], True where a key may be attended to; None when nothing is padded.

    lengths [rows] of a canvas of that width, None: all of it. The keys are as many as `attend` makes of the width.
    """
    keys = -(-width // TILE) * TILE if device.type == "cpu" else width
    if lengths is None:
        if keys == width:
            return None
        lengths = torch.full((1,), width, device=device)
    elif device.type == "cpu" and bool((lengths == keys).all()):
        # Only here: elsewhere the host would wait for the device, and a forward that is recorded may not.
        return None
    return (torch.arange(keys, device=device) < lengths[:, None])[:, None, None, :]


def block_mask(
    block: int, lengths: Tensor | None, width: int, device: torch.device, position: Tensor | None = None
) -> Tensor:
    """Attention mask [rows or 1, 1, queries, keys] of a model whose attention is causal between blocks: True where a
    key's block is the query's own or an earlier one.

    block: length of the blocks, which count from the start of the canvas; lengths and width as of `padding_mask`;
    position [rows, queries]: where on the canvas the queries stand, None: everywhere. A query sees itself, also where
    it is padding: a softmax over nothing would be no number, which spreads.
    """
    padding = padding_mask(lengths, width, device)
    place = torch.arange(width if padding is None else padding.shape[3], device=device)
    query = place[None] if position is None else position
    seen = (query[:, :, None] // block >= place // block)[:, None]
    return seen if padding is None else (seen & padding) | (query[:, :, None] == place)[:, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of query [rows, heads, length, head size] over key and value of as many heads or a divisor of it.

    mask: `padding_mask` of the canvas, or one that tells queries apart, [rows or 1, 1, queries, keys], of all keys or
    of a multiple of TILE of queries; scale: of the products, None: 1 / sqrt(head size). Returns [rows, length,
    heads * head size].
    """
    length = query.shape[2]
    more = 0 if mask is None else mask.shape[3] - key.shape[2]
    if more:
        query = F.pad(query, (0, 0, 0, -length % TILE))
        key, value = (F.pad(one, (0, 0, 0, more)) for one in (key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None:
        # On CUDA no fused kernel takes both a mask and grouped heads; the one left would hold every score.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return mixed.transpose(1, 2)[:, :length].flatten(2)


def taken(states: Tensor, at: Tensor | None) -> Tensor:
    """states [rows, length, size] at the positions at [rows, K]: [rows, K, size]; None: all of them."""
    return states if at is None else states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))


def mask_of(mask: Tensor | None, at: Tensor | None) -> Tensor | None:
    """A mask of queries at the positions at [rows, K]; None: at all of them. One that tells no queries apart is as it
    is."""
    if mask is None or at is None or mask.shape[2] == 1:
        return mask
    keys = mask.shape[3]
    return mask.expand(at.shape[0], -1, -1, -1).gather(2, at[:, None, :, None].expand(-1, -1, -1, keys))


def turned_to(turns: tuple[Tensor, Tensor], at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, size] at the positions at [rows, K]: [rows, 1, K, size], to be broadcast over heads;
    None: as they are."""
    if at is None:
        return turns
    cos, sin = turns
    return cos[at][:, None], sin[at][:, None]


def places(length: int, device: torch.device) -> Tensor:
    """The positions 0 to length - 1 and some more, float32: up to a multiple of TILE, so that what is computed of them
    has the same bits whatever the length."""
    return torch.arange(-(-length // TILE) * TILE, device=device, dtype=torch.float32)
