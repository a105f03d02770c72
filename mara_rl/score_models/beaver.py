"""Beaver reward and cost checkpoints: a LlamaModel with a linear score head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from mara_rl.common.errors import DataError
from mara_rl.score_models.base import ScoreType, in_batches, last_token
from mara_rl.score_models.weight_files import fill, read_json, read_state_dict

ARCHITECTURES = ("LlamaForScore", "LlamaModelForScore")
_TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"


class BeaverFields(BaseModel):
    """What a beaver ``config.json`` says beyond a Llama's."""

    score_dim: Literal[1] = 1
    score_bias: bool = True
    score_type: ScoreType = "reward"
    do_normalize: bool = False


class _Normalizer(nn.Module):
    """The running statistics saved beside the head; applied only if the config says so."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, score_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(score_dim))
        self.register_buffer("var", torch.ones(score_dim))
        self.register_buffer("count", torch.zeros(1))


class _Network(nn.Module):
    """Holds the weights under the checkpoint's own names."""

    def __init__(self, config: LlamaConfig, fields: BeaverFields) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.score_head = nn.Linear(config.hidden_size, fields.score_dim, bias=fields.score_bias)
        self.normalizer = _Normalizer(fields.score_dim)


class BeaverScoreModel:
    """Scores as the published beaver models do.

    The head is applied in float32 to the last hidden state at the last non-padding position of
    ``BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}``, no end of text appended.
    With ``do_normalize``, a reward is (s − mean) / (std + 1e-8) and a cost s / (std + 1e-8). A text
    longer than the model's positions loses tokens from its beginning.
    """

    def __init__(self, name: str, network: _Network, tokenizer: Any, fields: BeaverFields) -> None:
        self.name = name
        self.score_type = fields.score_type
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fields = fields

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score a (prompt, response) pair; of a cost, lower is safer."""
        limit = self.network.model.config.max_position_embeddings
        texts = [_TEXT.format(prompt=prompt, response=response) for prompt, response in pairs]
        sequences = [self.tokenizer(text)["input_ids"][-limit:] for text in texts]
        device = self.network.model.device
        return in_batches(sequences, self.tokenizer, device, self._batch).tolist()

    def _batch(self, inputs: dict[str, Tensor], rows: list[int]) -> Tensor:
        hidden = self.network.model(**inputs, use_cache=False).last_hidden_state
        score = self.network.score_head(last_token(hidden, inputs["attention_mask"]).float())
        normalizer = self.network.normalizer
        if self.fields.do_normalize:
            centre = normalizer.mean if self.fields.score_type == "reward" else 0.0
            score = (score - centre) / (normalizer.var.sqrt() + 1e-8)
        return score.squeeze(1)


def load_beaver(
    name: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> BeaverScoreModel:
    """Load a beaver folder. Raises DataError naming the config field or weight that is wrong."""
    raw = read_json(folder / "config.json")
    try:
        fields = BeaverFields.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{folder / 'config.json'}: {first['loc'][0]}: {first['msg']}") from error
    if fields.do_normalize and "score_type" not in raw:
        raise DataError(
            f"{folder / 'config.json'}: do_normalize is set but score_type is missing "
            "(expected 'reward' or 'cost')"
        )
    with init_empty_weights(include_buffers=False):
        network = _Network(LlamaConfig.from_dict(raw), fields)
    # Checkpoints of older Llama code also hold the rotary frequencies, which are recomputed now.
    # The head and the statistics stay float32 whatever the dtype of the LLM below them.
    state = {
        key: weight.to(dtype if key.startswith("model.") else torch.float32)
        for key, weight in read_state_dict(folder).items()
        if not key.endswith("rotary_emb.inv_freq")
    }
    fill(network, state, folder)
    network.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return BeaverScoreModel(name, network, tokenizer, fields)
