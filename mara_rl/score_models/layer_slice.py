"""Small score models: the first layers of an LLM and a small head."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from mara_rl.common.errors import ConfigError, DataError, first_line, validated
from mara_rl.common.yaml_settings import Section
from mara_rl.llm import slot_attention
from mara_rl.llm.packed_linear import pack_linears
from mara_rl.llm.policy_llm import SMOLLM2, DType, load_policy_llm
from mara_rl.score_models.base import BATCH_SIZE, ScoreType
from mara_rl.score_models.score_head import ScoreHead
from mara_rl.score_models.weight_files import fill, read_json, read_state_dict

CONFIG_FILE = "score.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FOLDER = "adapter"

_TEMPLATE_TOKENS = 32  # at most, of the two texts below
_PROMPT, _PADDING = -1, -2
_PLAIN_QUOTES = str.maketrans("‘’“”–—", "''\"\"--")
_BEFORE_PROMPT = "<|im_start|>user\n"
_BEFORE_RESPONSE = "<|im_end|>\n<|im_start|>assistant\n"


class SliceSpec(Section):
    """Everything beside the weights that fixes a layer-slice score model; its ``score.json``."""

    score_type: ScoreType = Field(description="reward: higher is better; cost: lower is better")
    backbone: str = Field(SMOLLM2, description="LLM whose first layers are used, by name")
    num_layers: int = Field(default=20, ge=1, description="decoder layers kept, without final norm")
    pooling: Literal["mean", "last"] = Field(
        "mean", description="response tokens the head reads: their mean, or the last"
    )
    adapter: Literal["none", "lora"] = Field("none", description="LoRA weights in `adapter/`")
    gated: bool = Field(False, description="the head also reads the state before the response")
    max_prompt_tokens: int = Field(default=128, ge=1, description="cut at the front")
    max_response_tokens: int = Field(default=256, ge=1, description="cut at the end")


class LayerSlice:
    """Turns (prompt, response) pairs into pooled hidden states of an LLM's first layers.

    The text is a ChatML conversation of a user and an assistant turn without system prompt. The
    assistant turn is left open, so that an answer cut at a length cap is read like any other. Both
    parts are normalised: typographic quotes and dashes become plain ones, runs of spaces and of
    line breaks become one. Every token's state is brought to root mean square 1 before pooling over
    the response; an empty response is read at the token before it.
    """

    def __init__(self, spec: SliceSpec, model: Any, tokenizer: Any) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    def encode(self, prompt: str, response: str) -> tuple[list[int], int]:
        """Token ids of a pair, and how many of them come before the response."""
        before, between = (self._ids(text) for text in (_BEFORE_PROMPT, _BEFORE_RESPONSE))
        # Special tokens written out in a text are text.
        asked, answered = (
            self._ids(_normalised(text), split_special_tokens=True) for text in (prompt, response)
        )
        head = [*before, *asked[-self.spec.max_prompt_tokens :], *between]
        return head + answered[: self.spec.max_response_tokens], len(head)

    def _ids(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def features(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """States (N, 2, H) float32 on the CPU of N pairs, without gradients; see `read`."""
        # Answers to one prompt stand together, prompts of like length too.
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), pairs[i][0]))
        states = torch.empty(len(pairs), 2, self.hidden_size)
        with torch.inference_mode():
            for first in range(0, len(order), BATCH_SIZE):
                batch = order[first : first + BATCH_SIZE]
                states[batch] = self.read([pairs[i] for i in batch]).cpu()
        return states

    def read(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """States (N, 2, H) of N pairs: pooled over the response, and right before it.

        One forward, in which responses to the same prompt share it: they stand behind it in one
        row, each at the positions right after the prompt and blind to the others.
        """
        rows = _Rows([self.encode(*pair) for pair in pairs])
        device = next(self.model.parameters()).device
        owner = rows.owner.to(device)
        hidden = self.model(
            input_ids=rows.tokens.to(device),
            position_ids=rows.positions.to(device),
            attention_mask=slot_attention.bias(rows.seen()[:, None], 1, self.model.dtype).to(
                device
            ),
            use_cache=False,
        ).last_hidden_state.float()
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)
        before = hidden[rows.row, rows.before]
        if self.spec.pooling == "last":
            return torch.stack([hidden[rows.row, rows.last], before], dim=1)
        answered = owner >= 0
        pooled = before.new_zeros(before.shape).index_add(0, owner[answered], hidden[answered])
        counts = owner[answered].bincount(minlength=len(pairs))[:, None]
        pooled = torch.where(counts > 0, pooled / counts.clamp_min(1), before)
        return torch.stack([pooled, before], dim=1)


class _Rows:
    """N token sequences in B rows of T: behind each prompt all its responses.

    Attributes:
        tokens, positions: (B, T), int64.
        owner: the sequence whose response a token belongs to; `_PROMPT`, `_PADDING` (B, T).
        row: each sequence's row (N,).
        before, last: the places of the last token before a response, and of its last token (N,).
    """

    def __init__(self, sequences: Sequence[tuple[list[int], int]]) -> None:
        """``sequences``: token ids, and how many of them come before the response."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (ids, length) in enumerate(sequences):
            shared.setdefault(tuple(ids[:length]), []).append(number)
        self.row, self.before, self.last = (
            torch.zeros(len(sequences), dtype=torch.long) for _ in range(3)
        )
        columns: list[list[Tensor]] = [[], [], []]
        for row, (prompt, members) in enumerate(shared.items()):
            tokens, length = list(prompt), len(prompt)
            positions, owner = list(range(length)), [_PROMPT] * length
            for number in members:
                response = sequences[number][0][length:]
                tokens += response
                positions += range(length, length + len(response))
                owner += [number] * len(response)
                self.row[number], self.before[number] = row, length - 1
                self.last[number] = len(tokens) - 1 if response else length - 1
            for column, values in zip(columns, (tokens, positions, owner), strict=True):
                column.append(torch.tensor(values))
        self.tokens, self.positions, self.owner = (
            nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=padding)
            for column, padding in zip(columns, (0, 0, _PADDING), strict=True)
        )

    def seen(self) -> Tensor:
        """Which tokens (last axis) each token sees (B, T, T), bool."""
        own = self.owner[:, :, None] == self.owner[:, None]
        return (own | (self.owner == _PROMPT)[:, None]).tril()


class SliceScoreModel:
    """A `LayerSlice` with a `ScoreHead`, applied in float32."""

    def __init__(self, name: str, layers: LayerSlice, head: ScoreHead) -> None:
        self.name = name
        self.score_type = layers.spec.score_type
        self.layers = layers
        self.head = head

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score a (prompt, response) pair."""
        if not pairs:
            return []
        with torch.inference_mode():
            return self.head(*self.layers.features(pairs).unbind(dim=1)).tolist()


def open_slice(spec: SliceSpec, device: torch.device, dtype: DType) -> LayerSlice:
    """The frozen layers ``spec`` asks for, without an adapter.

    Raises ConfigError when the backbone has fewer layers, an attention window that the longest
    text exceeds, or is not there.
    """
    llm = load_policy_llm(spec.backbone, device=device, dtype=dtype, pack=False)
    model = llm.model.base_model
    available = len(model.layers)
    if spec.num_layers > available:
        raise ConfigError(f"num_layers is {spec.num_layers}; {spec.backbone!r} has {available}")
    window = getattr(model.config, "sliding_window", None)
    longest = spec.max_prompt_tokens + spec.max_response_tokens
    if window is not None and window < longest + _TEMPLATE_TOKENS:
        raise ConfigError(
            f"max_prompt_tokens + max_response_tokens is {longest}; the attention window of "
            f"{spec.backbone!r} leaves {window - _TEMPLATE_TOKENS}"
        )
    model.layers = model.layers[: spec.num_layers]
    model.norm = nn.Identity()
    return LayerSlice(spec, model, llm.tokenizer)


def load_slice(name: str, folder: Path, device: torch.device, dtype: DType) -> SliceScoreModel:
    """Load what `save_slice` wrote. Raises DataError naming the field or weight at fault."""
    path = folder / CONFIG_FILE
    spec = validated(SliceSpec, read_json(path), f"{path}", error=DataError)
    layers = open_slice(spec, device, dtype)
    if spec.adapter == "lora":
        layers.model = _with_adapter(layers.model, folder / ADAPTER_FOLDER)
    pack_linears(layers.model)
    head = ScoreHead(layers.hidden_size, gated=spec.gated)
    fill(head, read_state_dict(folder), folder)
    return SliceScoreModel(name, layers, head.float().requires_grad_(False))


def save_slice(folder: Path, spec: SliceSpec, head: ScoreHead, adapter: Any | None = None) -> None:
    """Write a score model; ``adapter`` is the peft model when the spec has one.

    The folder appears once it is complete. Raises ConfigError when it is already there.
    """
    if folder.exists():
        raise ConfigError(f"{folder} already exists; expected a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as outer:
        scratch = Path(outer) / folder.name
        scratch.mkdir()
        (scratch / CONFIG_FILE).write_text(json.dumps(spec.model_dump(), indent=2) + "\n")
        weights = {key: value.contiguous() for key, value in head.state_dict().items()}
        (scratch / WEIGHTS_FILE).write_bytes(save(weights))
        if adapter is not None:
            adapter.save_pretrained(scratch / ADAPTER_FOLDER)
        os.rename(scratch, folder)


def _with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` with the LoRA weights of ``folder`` added into its own."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise DataError(f"{folder} could not be read as a LoRA adapter: {reason}") from error


def _normalised(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text.translate(_PLAIN_QUOTES))
    return re.sub(r"\s*\n\s*", "\n", text).strip()
