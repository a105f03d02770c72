"""One forward of an LLM over tokens of many slots, described by tensors alone."""

from typing import Any

import torch
from torch import Tensor

from mara_rl import slot_attention
from mara_rl.errors import ConfigError
from mara_rl.policy_llm import PolicyLLM
from mara_rl.slot_attention import Layout
from mara_rl.slot_cache import SlotCache

FIELDS = ("token", "slot", "place", "behind", "parent", "position")
"""What there is to know of a token; the rows of ``fields`` (6, N), int64:

- token: its id.
- slot, place: where its key and value go.
- behind: it sees the first so many places of its slot,
- parent: and this one (−1: no other), and itself.
- position: for the LLM's position encoding.
"""


class SlotForward:
    """Runs an LLM over a `SlotCache`. Touches nothing but the device, so it can be captured."""

    def __init__(self, llm: PolicyLLM, cache: SlotCache) -> None:
        """Raises ConfigError for kinds of attention layers that are not known."""
        config = llm.model.config.get_text_config()
        self.cache = cache
        self._model = llm.model
        self._windows = _attention_windows(config)
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._group = config.num_attention_heads // key_heads

    def __call__(self, fields: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
        """Hidden states (N, H) of the tokens in ``fields`` (6, N), on the LLM's device.

        ``rows`` are the slots of the layout's rows, in order; None means all. The cache has room
        and a view for all that is written and seen.
        """
        token, slot, place, *_, position = fields
        self.cache.aim(slot, place, rows)
        key = torch.arange(self.cache.view, device=fields.device)
        # (R, 1, W, 1) each. Where a row of the layout has no token they are 0: it sees one place.
        own, behind, parent, at = (layout.unpack(field)[:, None, :, None] for field in fields[2:])
        seen = (key < behind) | (key == own) | (key == parent)  # (R, 1, W, view)
        # Candidates lie beyond their position, so a window never hides one from what follows it.
        distance = at - key
        masks = {
            kind: slot_attention.bias(
                seen & (distance < window) if window else seen, self._group, self._model.dtype
            )
            for kind, window in self._windows.items()
        }
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        with slot_attention.used_by(self._model):
            return self._model.base_model(
                input_ids=token[None],
                attention_mask=mask,
                position_ids=position[None],
                past_key_values=self.cache,
                use_cache=True,
                layout=layout,
            ).last_hidden_state[0]


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
