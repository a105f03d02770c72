"""Attention of packed tokens over the slots of a `SlotCache`, for any LLM of transformers.

A forward gets one row of N tokens that belong to R slots, so the LLM's linear layers see no
padding. Only here, where each token must see its own slot's keys, are they laid out as (R, W).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from mara_rl.common.errors import ConfigError

NAME = "mara_slots"


@dataclass(frozen=True)
class Layout:
    """Where the N packed tokens stand: token n is column ``column[n]`` of row ``row[n]``.

    ``width`` W is the largest number of tokens of one of the R rows. ``full`` says that all rows
    have W tokens, in order, so that packing and unpacking are reshapes.
    """

    rows: int
    width: int
    row: Tensor
    column: Tensor
    full: bool

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, ...) to (R, W, ...), zeros where a row is shorter."""
        if self.full:
            return packed.unflatten(0, (self.rows, self.width))
        padded = packed.new_zeros(self.rows, self.width, *packed.shape[1:])
        padded[self.row, self.column] = packed
        return padded

    def pack(self, padded: Tensor) -> Tensor:
        """(R, W, ...) to (N, ...)."""
        return padded.flatten(0, 1) if self.full else padded[self.row, self.column]


def bias(seen: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention logits (R, 1, group · W, view): made once for all layers.

    ``seen`` (R, 1, W, view), bool, is what each token sees; ``group`` the number of heads that
    share a key head.
    """
    hidden = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return hidden.repeat(1, 1, group, 1) if group > 1 else hidden


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    layout: Layout,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with keys and values of whole slots.

    Args:
        query: (1, heads, N, D).
        key, value: (R, key heads, view, D).
        attention_mask: (R, 1, group · W, view), what `bias` made of what each token sees.
        layout: where the tokens stand.
        scaling, softcap: of the LLM's attention logits.
        s_aux: attention sinks (gpt-oss), which are not supported.

    Returns (1, N, heads, D); the second value is always None.
    """
    if s_aux is not None:
        raise ConfigError("attention sinks are not supported")
    key_heads = key.shape[1]
    group = query.shape[1] // key_heads
    # The heads that share a key head become further queries of it: (R, key heads, group · W, D).
    q = layout.unpack(query[0].transpose(0, 1)).unflatten(2, (key_heads, group))
    q = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, key, value, attention_mask, scale=scaling
        )
    else:
        logits = q @ key.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = torch.tanh(logits / softcap) * softcap
        logits = logits.float() + attention_mask
        out = torch.softmax(logits, dim=-1).to(q.dtype) @ value
    out = out.unflatten(2, (group, layout.width)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return layout.pack(out)[None], None


AttentionInterface.register(NAME, slot_attention)


@contextlib.contextmanager
def used_by(model: Any) -> Iterator[None]:
    """Let a model of transformers attend with `slot_attention` for the length of the block."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
