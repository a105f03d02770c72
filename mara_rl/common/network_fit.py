"""The one loop in which networks are fitted to what is known already, by AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mara_rl.common.errors import DataError


def fit_network(
    parameters: Iterable[nn.Parameter] | Sequence[dict[str, Any]],
    losses: Callable[[], Iterable[Tensor]],
    *,
    name: str,
    epochs: int,
    lr: float,
    weight_decay: float = 0.01,
    cycle_batches: int | None = None,
    clipped: Sequence[Tensor] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Minimise: ``losses()`` goes through the data once, yielding the loss of each batch.

    Args:
        parameters: what is fitted, or groups of it with settings of their own, as torch takes them.
        name: of what is fitted, as errors begin with it.
        cycle_batches: batches of an epoch, for a learning rate that rises to ``lr`` in the first
            tenth of all and falls to about 0 after; None for one that stays.
        clipped: parameters whose gradients are scaled down to a common norm of 1.
        progress: told of every epoch.

    Raises:
        DataError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = None
    if cycle_batches is not None:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=epochs * cycle_batches + 1, pct_start=0.1
        )
    for _ in range(epochs):
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()
            if clipped:
                nn.utils.clip_grad_norm_(clipped, 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        if not torch.isfinite(loss):
            raise DataError(f"{name}'s error is not finite")
        if progress is not None:
            progress(1)
