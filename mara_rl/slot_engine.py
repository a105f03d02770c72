"""One-at-a-time forwards of a frozen LLM over S slots, each a sequence of its own length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mara_rl.errors import ConfigError
from mara_rl.policy_llm import PolicyLLM
from mara_rl.slot_cache import SlotCache


class SlotEngine:
    """S slots over one LLM. A slot holds committed tokens and, past them, one pending candidate.

    `prefill` commits prompt tokens, `propose` looks at one pending token per slot (overwriting the
    last one looked at), `commit` makes the pending token part of the sequence. Hidden states are
    those after the final norm, in the LLM's dtype.

    Attributes:
        lengths: committed tokens per slot (S,), int64 on the CPU.
        prefill_tokens: prompt tokens put through the LLM so far.
        candidate_tokens: pending tokens put through the LLM so far.
    """

    def __init__(self, llm: PolicyLLM, num_slots: int) -> None:
        config = llm.model.config.get_text_config()
        self.llm = llm
        self.num_slots = num_slots
        self.lengths = torch.zeros(num_slots, dtype=torch.long)
        self.prefill_tokens = 0
        self.candidate_tokens = 0
        self._cache = SlotCache(config.num_hidden_layers, num_slots, llm.device)
        self._windows = _attention_windows(config)
        self._attention = llm.model.config._attn_implementation
        if self._attention not in ("sdpa", "eager"):
            raise ConfigError(
                f"llm {llm.name!r}: attention {self._attention!r}; expected 'sdpa' or 'eager'"
            )

    def clear(self, slots: Sequence[int]) -> None:
        """Forget what these slots hold."""
        self.lengths[list(slots)] = 0

    @torch.inference_mode()
    def scrub(self, slots: Sequence[int]) -> None:
        """Zero what these slots hold: a state that is not finite would spoil what comes after."""
        self.clear(slots)
        self._cache.zero(slots)

    @torch.inference_mode()
    def prefill(self, slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> Tensor:
        """Commit one chunk of prompt tokens per slot; hidden states (R, H) of each chunk's last."""
        sizes = torch.tensor([len(chunk) for chunk in chunks])
        width = int(sizes.max())
        tokens = torch.zeros(len(slots), width, dtype=torch.long)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk)] = torch.as_tensor(chunk)
        start = self.lengths[list(slots)]
        # Padding lands past the chunk, where later tokens overwrite it before anyone looks.
        positions = start[:, None] + torch.arange(width)
        hidden = self._forward(tokens, positions, list(slots))
        self.lengths[list(slots)] += sizes
        self.prefill_tokens += int(sizes.sum())
        return hidden[torch.arange(len(slots)), sizes - 1]

    @torch.inference_mode()
    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make every target slot hold what the source slot of the same place holds."""
        self._cache.copy(sources, targets, int(self.lengths[list(sources)].max()))
        self.lengths[list(targets)] = self.lengths[list(sources)]

    @torch.inference_mode()
    def propose(self, tokens: Tensor) -> Tensor:
        """Put one pending token (S,) behind each slot's committed ones; hidden states (S, H).

        Idle slots take any token id: what they write is overwritten before it is looked at.
        """
        self.candidate_tokens += self.num_slots
        return self._forward(tokens[:, None], self.lengths[:, None].clone(), None)[:, 0]

    def commit(self, accepted: Tensor) -> None:
        """Make the pending token of the slots where ``accepted`` (S,), bool, part of them."""
        self.lengths += accepted.long()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (R, V), float32, after tokens with hidden states (R, H)."""
        logits = self.llm.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.llm.model.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _forward(self, tokens: Tensor, positions: Tensor, rows: list[int] | None) -> Tensor:
        device = self.llm.device
        self._cache.aim(positions.to(device), int(positions.max()) + 1, rows)
        positions = positions.to(device)
        key = torch.arange(self._cache.view, device=device)
        distance = positions[:, None, :, None] - key  # (R, 1, Q, view)
        masks = {
            kind: (distance >= 0) & (distance < window) if window else distance >= 0
            for kind, window in self._windows.items()
        }
        if self._attention == "eager":  # which adds the mask to the scores
            dtype = self.llm.model.dtype
            hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=device)
            masks = {kind: torch.where(m, 0.0, hidden) for kind, m in masks.items()}
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        return self.llm.model.base_model(
            input_ids=tokens.to(device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state


def _attention_windows(config: Any) -> dict[str, int | None]:
    """The attention window per layer type; one entry where all layers share one mask."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return {"all": window}
    windows = {"full_attention": None, "sliding_attention": window}
    if not set(types) <= set(windows):
        raise ConfigError(f"attention layers {sorted(set(types))}; expected {sorted(windows)}")
    return {kind: windows[kind] for kind in sorted(set(types))}
