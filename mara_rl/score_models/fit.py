"""Training a layer-slice score model on preference pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mara_rl.errors import ConfigError
from mara_rl.score_models.base import pad
from mara_rl.score_models.bradley_terry import (
    Accuracy,
    accuracy_by_kind,
    fit_direction,
    fit_head,
    folds_of,
    out_of_fold_margins,
)
from mara_rl.score_models.layer_slice import LayerSlice, SliceSpec, open_slice
from mara_rl.score_models.pairs import Pair

L2_GRID = (0.1, 0.3, 1.0, 3.0)
PAIRS_PER_STEP = 16

OnPairs = Callable[[int], object]
"""Told how many pairs were worked through since the last call."""


@dataclass(frozen=True)
class FitResult:
    """A fitted model and how well its like did on pairs not fitted.

    Attributes:
        head: the linear head, fitted to all pairs.
        adapter: the peft model when the spec has an adapter.
        l2: the regularisation that cross-validated best.
        accuracies: cross-validated accuracies, "all" and by kind of pair.
        by_l2: cross-validated accuracy over all pairs for each regularisation tried.
    """

    head: nn.Linear
    adapter: Any | None
    l2: float
    accuracies: dict[str, Accuracy]
    by_l2: dict[float, Accuracy]


def fit_slice(
    pairs: Sequence[Pair],
    spec: SliceSpec,
    *,
    folds: int,
    seed: int,
    epochs: int = 1,
    learning_rate: float = 2e-4,
    device: torch.device,
    on_pairs: OnPairs = lambda count: None,
) -> FitResult:
    """Fit a score model by Bradley–Terry and cross-validate it.

    Without an adapter the layers are frozen: each answer's features are computed once. With one,
    the LoRA weights are trained for ``epochs`` in every fold and once more on all pairs, and the
    head is then fitted to the adapted features. Raises ConfigError when the pairs have fewer
    prompts than folds.
    """
    fold_of_pair = folds_of(pairs, folds, seed)
    if len(fold_of_pair.unique()) < folds:
        raise ConfigError(f"folds is {folds}; the pairs have too few different prompts for that")
    signs = {"reward": 1.0, "cost": -1.0}
    everything = torch.ones(len(pairs), dtype=torch.bool)

    def features(chosen: Tensor) -> tuple[Any | None, Tensor, Tensor]:
        """The adapter trained on the ``chosen`` pairs, and all pairs' features (N, H) with it."""
        layers = open_slice(spec, device, "float32")
        adapter = None
        if spec.adapter == "lora":
            trained = [pair for pair, used in zip(pairs, chosen.tolist(), strict=True) if used]
            adapter = train_lora(layers, trained, epochs, learning_rate, seed, on_pairs)
        return adapter, *_features(layers, pairs, on_pairs)

    shared = features(everything)

    def margins(fitted: Tensor, judged: Tensor) -> Tensor:
        """Margins (judged, grid) of heads fitted with each regularisation."""
        _, better, worse = shared if spec.adapter == "none" else features(fitted)
        scale = torch.cat([better[fitted], worse[fitted]]).std(dim=0).clamp_min(1e-6)
        differences = ((better - worse) / scale).double()
        weights = [fit_direction(differences[fitted], l2) for l2 in L2_GRID]
        return differences[judged] @ torch.stack(weights, dim=1)

    held_out = out_of_fold_margins(fold_of_pair, margins)
    tables = [accuracy_by_kind(pairs, column) for column in held_out.unbind(dim=1)]
    best = max(range(len(L2_GRID)), key=lambda i: tables[i]["all"].correct)
    adapter, better, worse = shared
    return FitResult(
        head=fit_head(better, worse, L2_GRID[best], sign=signs[spec.score_type]),
        adapter=adapter,
        l2=L2_GRID[best],
        accuracies=tables[best],
        by_l2={l2: table["all"] for l2, table in zip(L2_GRID, tables, strict=True)},
    )


def train_lora(
    layers: LayerSlice,
    pairs: Sequence[Pair],
    epochs: int,
    learning_rate: float,
    seed: int,
    on_pairs: OnPairs,
) -> Any:
    """Put a LoRA adapter into ``layers``, train it with a throw-away head, return the peft model.

    Only the upper half of the layers is adapted, so that the backward pass stops there.
    """
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        count = layers.spec.num_layers
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            layers_to_transform=list(range(count // 2, count)),
        )
        model = get_peft_model(layers.model, config)
        head = nn.Linear(layers.hidden_size, 1, bias=False).to(model.device)
        nn.init.zeros_(head.weight)
        layers.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate)
        optimizer.add_param_group({"params": [head.weight], "lr": 5 * learning_rate})
        for _ in range(epochs):
            for batch in torch.randperm(len(pairs), generator=generator).split(PAIRS_PER_STEP):
                texts = [(pairs[i].prompt, pairs[i].chosen) for i in batch.tolist()]
                texts += [(pairs[i].prompt, pairs[i].rejected) for i in batch.tolist()]
                encoded = [layers.encode(*text) for text in texts]
                inputs = pad([ids for ids, _ in encoded], layers.tokenizer, model.device)
                starts = torch.tensor([start for _, start in encoded])
                better, worse = head(layers.pooled(inputs, starts)).squeeze(1).chunk(2)
                loss = nn.functional.softplus(worse - better).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                on_pairs(len(batch))
    return model.eval()


def _features(
    layers: LayerSlice, pairs: Sequence[Pair], on_pairs: OnPairs
) -> tuple[Tensor, Tensor]:
    """Features (N, H) of the better and of the worse answers."""
    better, worse = [], []
    for first in range(0, len(pairs), 64):
        chunk = pairs[first : first + 64]
        both = layers.features(
            [(pair.prompt, pair.chosen) for pair in chunk]
            + [(pair.prompt, pair.rejected) for pair in chunk]
        )
        better.append(both[: len(chunk)])
        worse.append(both[len(chunk) :])
        on_pairs(len(chunk))
    return torch.cat(better), torch.cat(worse)
