"""Training a layer-slice score model on preference pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mara_rl.common.errors import ConfigError
from mara_rl.common.network_fit import fit_network
from mara_rl.llm.policy_llm import DType
from mara_rl.score_models.bradley_terry import (
    Accuracy,
    accuracy_by_kind,
    folds_of,
    out_of_fold_margins,
)
from mara_rl.score_models.layer_slice import LayerSlice, SliceSpec, open_slice
from mara_rl.score_models.pairs import Pair
from mara_rl.score_models.score_head import PairFeatures, ScoreHead, fit_head

L2_GRID = (0.03, 0.1, 0.3, 1.0, 3.0)
PAIRS_PER_STEP = 16

OnPairs = Callable[[int], object]
"""Told how many pairs were worked through since the last call."""


@dataclass(frozen=True)
class FitResult:
    """A fitted model and how well its like did on pairs not fitted.

    Attributes:
        head: the head, fitted to all pairs.
        adapter: the peft model when the spec has an adapter.
        l2: the regularisation that cross-validated best.
        accuracies: cross-validated accuracies, "all" and by kind of pair.
        by_l2: cross-validated accuracy over all pairs for each regularisation tried.
    """

    head: ScoreHead
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
    l2_grid: Sequence[float] = L2_GRID,
    device: torch.device,
    dtype: DType = "float32",
    on_pairs: OnPairs = lambda count: None,
) -> FitResult:
    """Fit a score model by Bradley–Terry, its regularisation chosen by cross-validation.

    Without an adapter the layers are frozen: each answer's features are computed once. With one,
    the LoRA weights are trained for ``epochs`` in every fold and once more on all pairs, and the
    head is then fitted to the adapted features. Raises ConfigError when the pairs have fewer
    prompts than folds; ``dtype`` is that of the layers, the head is always fitted in float64.
    """
    fold_of_pair = folds_of(pairs, folds, seed)
    if len(fold_of_pair.unique()) < folds:
        raise ConfigError(f"folds is {folds}; the pairs have too few different prompts for that")
    everything = torch.ones(len(pairs), dtype=torch.bool)

    def select(chosen: Tensor) -> list[Pair]:
        return [pair for pair, used in zip(pairs, chosen.tolist(), strict=True) if used]

    def adapted(fitted: Tensor) -> tuple[Any | None, PairFeatures]:
        """The adapter trained on the ``fitted`` pairs, and all pairs' features with it."""
        layers = open_slice(spec, device, dtype)
        adapter = None
        if spec.adapter == "lora":
            adapter = train_lora(layers, select(fitted), epochs, learning_rate, seed, on_pairs)
        return adapter, read_features(layers, pairs, on_pairs)

    adapter, features = adapted(everything)

    def margins(fitted: Tensor, judged: Tensor) -> Tensor:
        """Margins (judged, grid) of heads fitted with each regularisation."""
        own = features if spec.adapter == "none" else adapted(fitted)[1]
        train, test = own.select(fitted), own.select(judged)
        heads = [fit_head(select(fitted), train, l2, gated=spec.gated) for l2 in l2_grid]
        columns = [head(test.better, test.prompt) - head(test.worse, test.prompt) for head in heads]
        return torch.stack(columns, dim=1)

    held_out = out_of_fold_margins(fold_of_pair, margins)
    tables = [accuracy_by_kind(pairs, column) for column in held_out.unbind(dim=1)]
    best = max(range(len(l2_grid)), key=lambda i: (tables[i]["all"].correct, i))
    sign = {"reward": 1.0, "cost": -1.0}[spec.score_type]
    return FitResult(
        head=fit_head(pairs, features, l2_grid[best], gated=spec.gated, sign=sign),
        adapter=adapter,
        l2=l2_grid[best],
        accuracies=tables[best],
        by_l2={l2: table["all"] for l2, table in zip(l2_grid, tables, strict=True)},
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
        upper = "|".join(str(layer) for layer in range(count // 2, count))
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=rf"layers\.({upper})\.self_attn\.[qkvo]_proj"
        )
        model = get_peft_model(layers.model, config)
        head = nn.Linear(layers.hidden_size, 1, bias=False).to(model.device)
        nn.init.zeros_(head.weight)
        layers.model = model
        trained = [p for p in model.parameters() if p.requires_grad]

        def losses() -> Iterator[Tensor]:
            for batch in torch.randperm(len(pairs), generator=generator).split(PAIRS_PER_STEP):
                texts = [(pairs[i].prompt, pairs[i].chosen) for i in batch.tolist()]
                texts += [(pairs[i].prompt, pairs[i].rejected) for i in batch.tolist()]
                better, worse = head(layers.read(texts)[:, 0]).squeeze(1).chunk(2)
                yield nn.functional.softplus(worse - better).mean()
                on_pairs(len(batch))

        groups: list[dict[str, Any]] = [
            {"params": trained},
            {"params": [head.weight], "lr": 5 * learning_rate},
        ]
        fit_network(
            groups,
            losses,
            name="the LoRA adapter",
            epochs=epochs,
            lr=learning_rate,
            clipped=trained,
        )
    return model.eval()


def read_features(layers: LayerSlice, pairs: Sequence[Pair], on_pairs: OnPairs) -> PairFeatures:
    """The features of all pairs; each text is read once."""
    row_of: dict[tuple[str, str], int] = {}
    read = [torch.empty(0, 2, layers.hidden_size)]
    for first in range(0, len(pairs), 128):
        chunk = pairs[first : first + 128]
        texts = [(pair.prompt, text) for pair in chunk for text in (pair.chosen, pair.rejected)]
        new = [text for text in dict.fromkeys(texts) if text not in row_of]
        row_of |= {text: len(row_of) + i for i, text in enumerate(new)}
        if new:
            read.append(layers.features(new))
        on_pairs(len(chunk))
    states = torch.cat(read)
    better = states[[row_of[pair.prompt, pair.chosen] for pair in pairs]]
    worse = states[[row_of[pair.prompt, pair.rejected] for pair in pairs]]
    return PairFeatures(better[:, 0], worse[:, 0], better[:, 1])
