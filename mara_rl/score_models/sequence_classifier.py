"""Reward models published as one-logit sequence classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mara_rl.common.errors import DataError, first_line
from mara_rl.score_models.base import ScoreType, in_batches


class SequenceClassifierScoreModel:
    """The one logit of a sequence classifier on the user and assistant turn, chat-templated.

    A text longer than the model's positions loses tokens from its beginning.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.score_type: ScoreType = "reward"
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One logit a (prompt, response) pair."""
        limit = self.model.config.max_position_embeddings
        sequences = [
            self.tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": response},
                ],
                tokenize=True,
                return_dict=False,
            )[-limit:]
            for prompt, response in pairs
        ]
        return in_batches(sequences, self.tokenizer, self.model.device, self._batch).tolist()

    def _batch(self, inputs: dict[str, Tensor], rows: list[int]) -> Tensor:
        return self.model(**inputs, use_cache=False).logits.squeeze(1)


def load_sequence_classifier(
    name: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> SequenceClassifierScoreModel:
    """Load a transformers folder.

    Raises DataError when it cannot be read, gives other than one logit, lacks the logit's weights
    or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise DataError(f"score model {name!r} could not be loaded: {reason}") from error
    if report["missing_keys"]:
        raise DataError(f"score model {name!r} lacks the weight {min(report['missing_keys'])!r}")
    if model.config.num_labels != 1:
        raise DataError(f"score model {name!r} gives {model.config.num_labels} logits; expected 1")
    if tokenizer.chat_template is None:
        raise DataError(f"score model {name!r} has no chat template; expected one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return SequenceClassifierScoreModel(name, model.to(device), tokenizer)
