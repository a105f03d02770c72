"""What every score model offers, and the padding they share."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

BATCH_SIZE = 32
ScoreType = Literal["reward", "cost"]


class ScoreModel(Protocol):
    """A frozen model that gives each (prompt, response) pair one number.

    Attributes:
        name: the shipped name, hub id or folder it was loaded by.
        score_type: ``reward``, where higher is better, or ``cost``, where lower is.
    """

    name: str
    score_type: ScoreType

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One float32 score a (prompt, response) pair, in order; each as if scored alone."""
        ...


def in_batches(
    sequences: Sequence[Sequence[int]],
    tokenizer: Any,
    device: torch.device,
    compute: Callable[[dict[str, Tensor], list[int]], Tensor],
) -> Tensor:
    """One float32 result a token id sequence (N, …), in order, from batches of similar length.

    ``compute`` gets the padded inputs of a transformers model (see `pad`) and the indices of the
    sequences in them, and returns their results (B, …). An empty batch gives an empty tensor.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    results = []
    with torch.inference_mode():
        for first in range(0, len(order), BATCH_SIZE):
            batch = order[first : first + BATCH_SIZE]
            inputs = pad([sequences[i] for i in batch], tokenizer, device)
            results.append(compute(inputs, batch).float().cpu())
    if not results:
        return torch.empty(0)
    return torch.cat(results)[torch.tensor(order).argsort()]


def pad(
    sequences: Sequence[Sequence[int]], tokenizer: Any, device: torch.device
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``position_ids`` (B, T) of sequences.

    Padded on the tokenizer's side. Positions count real tokens from 0, so that the side makes no
    difference.
    """
    padded = tokenizer.pad({"input_ids": [list(ids) for ids in sequences]}, return_tensors="pt")
    mask = padded["attention_mask"]
    inputs = {
        "input_ids": padded["input_ids"],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, H) at each row's last non-padding position, of ``hidden`` (B, T, H)."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * attention_mask).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
