"""The one way networks are fitted to what is known already: AdamW, one cycle of the step size."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mara_rl.common.errors import DataError


def fit_network(
    network: nn.Module,
    losses: Callable[[], Iterable[Tensor]],
    *,
    name: str,
    epochs: int,
    batches: int,
    lr: float,
    weight_decay: float,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Minimise: ``losses()`` goes through the data once, yielding the loss of each batch.

    The learning rate rises to ``lr`` in the first tenth of the epochs' ``batches`` and falls to
    about 0 after. ``progress`` is told of every epoch. Raises DataError, naming what is fitted by
    ``name``, when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * batches + 1, pct_start=0.1
    )
    for _ in range(epochs):
        for loss in losses():
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            raise DataError(f"warm_start: the {name}'s error is not finite")
        if progress is not None:
            progress(1)
