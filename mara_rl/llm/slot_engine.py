"""Forwards of a frozen LLM over S slots, each a sequence of its own length."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from mara_rl.common.errors import ConfigError, first_line
from mara_rl.llm import slot_attention
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.llm.slot_attention import Layout
from mara_rl.llm.slot_cache import SlotCache

_PROBE_TOKENS = 12
_MAX_PROBE_KL = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}  # nats
_probed: WeakSet[PolicyLLM] = WeakSet()


class SlotEngine:
    """S slots over one LLM. A slot holds committed tokens and, past them, candidates looked at.

    `prefill` commits prompt tokens. `propose` looks at one candidate per slot (overwriting the last
    one looked at) and `commit` makes it part of the sequence; `look` looks at any number of
    candidates of some slots, each blind to the others, and `take` makes one of them part of the
    sequence. Hidden states are those after the final norm, in the LLM's dtype.

    Attributes:
        lengths: committed tokens per slot (S,), int64 on the CPU.
        prefill_tokens: prompt tokens put through the LLM so far.
        candidate_tokens: candidates put through the LLM so far.
        forwards: forwards of the LLM so far.

    The first engine of an LLM is held against the LLM's own forward. Raises ConfigError where they
    differ: the architecture does what is not known here.
    """

    def __init__(self, llm: PolicyLLM, num_slots: int) -> None:
        if llm not in _probed:
            _probed.add(llm)  # the probe makes an engine of its own
            try:
                _probe(llm)
            except BaseException:
                _probed.remove(llm)
                raise
        config = llm.model.config.get_text_config()
        self.llm = llm
        self.num_slots = num_slots
        self.lengths = torch.zeros(num_slots, dtype=torch.long)
        self.prefill_tokens = 0
        self.candidate_tokens = 0
        self.forwards = 0
        self._cache = SlotCache(config.num_hidden_layers, num_slots, llm.device)
        self._windows = _attention_windows(config)
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._group = config.num_attention_heads // key_heads
        self._all = torch.arange(num_slots)

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
        rows = torch.as_tensor(slots)
        counts = torch.tensor([len(chunk) for chunk in chunks])
        tokens = torch.tensor([token for chunk in chunks for token in chunk])
        hidden = self._forward(rows, counts, tokens, self.lengths[rows])
        self.lengths[rows] += counts
        self.prefill_tokens += len(tokens)
        return hidden[counts.cumsum(0) - 1]

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
        ones = torch.ones_like(self._all)
        return self._forward(None, ones, tokens, self.lengths)

    def commit(self, accepted: Tensor) -> None:
        """Make the pending token of the slots where ``accepted`` (S,), bool, part of them."""
        self.lengths += accepted.long()

    @torch.inference_mode()
    def look(
        self,
        slots: Tensor,
        counts: Tensor,
        tokens: Tensor,
        looked: Tensor,
        parents: Tensor | None = None,
    ) -> Tensor:
        """Look at candidates for the next token of some slots in one forward.

        Args:
            slots: (R,), int64.
            counts: candidates per slot (R,), all at least 1.
            tokens: the N candidates, slot by slot (N,), int64. They get the places from
                ``looked`` on, counted from the end of the slot.
            looked: candidates that each slot has looked at before, since it last grew (R,).
            parents: for a candidate that is to follow another one looked at before, that one's
                place; −1 for candidates of the next token (N,), int64. None means all −1.

        Returns hidden states (N, H). All candidates looked at stay until one is taken; then those
        that follow it stay as candidates of the new next token, one place earlier.
        """
        self.candidate_tokens += len(tokens)
        if parents is None:
            parents = torch.full_like(tokens, -1)
        return self._forward(slots, counts, tokens, self.lengths[slots] + looked, parents)

    @torch.inference_mode()
    def take(self, slots: Tensor, index: Tensor) -> None:
        """Make the candidate in place ``index`` (R,) of each slot (R,) part of it."""
        ends = self.lengths[slots]
        moved = index > 0
        if moved.any():
            device = self.llm.device
            rows, targets = slots[moved].to(device), ends[moved].to(device)
            self._cache.move(rows, targets + index[moved].to(device), targets)
        self.lengths[slots] += 1

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (R, V), float32, after tokens with hidden states (R, H)."""
        logits = self.llm.model.get_output_embeddings()(hidden).float()
        config = self.llm.model.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits *= scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits /= scale
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _forward(
        self,
        slots: Tensor | None,
        counts: Tensor,
        tokens: Tensor,
        first: Tensor,
        parents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (N, H) of N tokens, ``counts`` (R,) of them for each slot (None: all).

        A slot's tokens go to the places from ``first`` (R,) on. They follow each other, or, with
        ``parents`` as for `look`, are alternatives, each blind to all but what it follows.
        """
        device = self.llm.device
        width, longest = int(counts.max()), int((first + counts).max())
        row = torch.arange(len(counts)).repeat_interleave(counts)
        column = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[row]
        layout = Layout(
            len(counts),
            width,
            row.to(device),
            column.to(device),
            full=len(tokens) == len(counts) * width,
        )
        rows = self._all if slots is None else slots
        self._cache.aim(
            rows[row].to(device),
            (first[row] + column).to(device),
            longest,
            None if torch.equal(rows, self._all) else rows.to(device),
        )
        places = (first[:, None] + torch.arange(width)).to(device)
        ends = self.lengths[rows][:, None].to(device)
        key = torch.arange(self._cache.view, device=device)
        if parents is None:
            positions = places
            seen = key <= positions[:, None, :, None]  # (R, 1, W, view)
        else:
            parent = layout.unpack(parents.to(device))
            positions = ends + (parent >= 0)
            seen = (key < ends[:, None, :, None]) | (key == places[:, None, :, None])
            seen |= (key == (ends + parent)[:, None, :, None]) & (parent >= 0)[:, None, :, None]
        # Candidates lie beyond their position, so a window never hides one from what follows it.
        distance = positions[:, None, :, None] - key
        masks = {
            kind: slot_attention.bias(
                seen & (distance < window) if window else seen, self._group, self.llm.model.dtype
            )
            for kind, window in self._windows.items()
        }
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        self.forwards += 1
        with slot_attention.used_by(self.llm.model):
            return self.llm.model.base_model(
                input_ids=tokens[None].to(device),
                attention_mask=mask,
                position_ids=layout.pack(positions)[None],
                past_key_values=self._cache,
                use_cache=True,
                layout=layout,
            ).last_hidden_state[0]


@torch.inference_mode()
def _probe(llm: PolicyLLM) -> None:
    """Raise ConfigError unless an engine predicts what the LLM by itself does."""
    architecture = type(llm.model).__name__
    vocabulary = llm.model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(1, _PROBE_TOKENS + 1) * 7919 % vocabulary).tolist()
    try:
        expected = llm.model(torch.tensor([tokens], device=llm.device)).logits[0, -1].float()
        engine = SlotEngine(llm, 1)
        engine.prefill([0], [tokens[:-1]])
        hidden = engine.look(
            torch.tensor([0]), torch.tensor([2]), torch.tensor([0, tokens[-1]]), torch.tensor([0])
        )
        found = engine.logits(hidden[1:])[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # architectures differ in whatever they lack
        reason = first_line(error)
        if not isinstance(error, ConfigError):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(
            f"llm {llm.name!r}: architecture {architecture} is not supported: {reason}"
        ) from error
    known = expected.isfinite()  # an LLM may rule tokens out
    expected, found = expected.log_softmax(-1)[known], found.log_softmax(-1)[known]
    kl = float((expected.exp() * (expected - found)).sum())
    if len(expected) and not kl <= _MAX_PROBE_KL[llm.model.dtype]:
        raise ConfigError(
            f"llm {llm.name!r}: architecture {architecture} is not supported: decoding in slots "
            f"is {kl:.2g} nats from the LLM's own forward"
        )


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
