"""A key/value cache whose rows (slots) each have a length of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CAPACITY_STEP = 128


class SlotLayer(CacheLayerMixin):
    """Keys and values (S, heads, capacity, D) of one layer; sliding layers keep full length too."""

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache
        self.keys: Any = None
        self.values: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._grown(self.keys, key_states)
        self.values = self._grown(self.values, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Write (R, heads, Q, D) at the cache's current rows and positions; return those rows."""
        cache = self.cache
        if not self.is_initialized or self.keys.shape[2] < cache.capacity:
            self.lazy_initialization(key_states, value_states)
        at = (cache.rows[:, None], slice(None), cache.positions)  # (R, Q, heads, D)
        self.keys[at] = key_states.transpose(1, 2)
        self.values[at] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : cache.view], self.values[:, :, : cache.view]
        return (keys, values) if cache.all_rows else (keys[cache.rows], values[cache.rows])

    def _grown(self, old: Any, like: Tensor) -> Tensor:
        shape = (self.cache.num_slots, like.shape[1], self.cache.capacity, like.shape[3])
        new = like.new_zeros(shape)
        if old is not None:
            new[:, :, : old.shape[2]] = old
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.view, 0

    def get_seq_length(self) -> int:
        return self.cache.view

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """KV cache of S slots. `aim` says where the next forward writes and how far it looks."""

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.num_slots = num_slots
        self.device = device
        self.capacity = 0
        self.view = 0
        self.all_rows = True
        self.rows = torch.arange(num_slots, device=device)
        self.positions = torch.zeros(num_slots, 1, dtype=torch.long, device=device)

    def zero(self, slots: Sequence[int]) -> None:
        """Zero all keys and values of these slots."""
        slot_layers: list[Any] = self.layers
        for layer in slot_layers:
            if layer.is_initialized:
                layer.keys[list(slots)] = 0
                layer.values[list(slots)] = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` keys and values of each source slot to its target slot."""
        slot_layers: list[Any] = self.layers
        for layer in slot_layers:
            if layer.is_initialized:
                layer.keys[list(targets), :, :length] = layer.keys[list(sources), :, :length]
                layer.values[list(targets), :, :length] = layer.values[list(sources), :, :length]

    def aim(self, positions: Tensor, longest: int, rows: Sequence[int] | None = None) -> None:
        """Set the target of the next forward.

        Args:
            positions: where the keys and values of the R × Q tokens go (R, Q), int64.
            longest: the greatest position any query looks at, plus 1.
            rows: the slots of the R rows; None means all of them in order.
        """
        self.view = -(-longest // 32) * 32
        self.capacity = max(self.capacity, -(-self.view // CAPACITY_STEP) * CAPACITY_STEP)
        self.positions = positions
        self.all_rows = rows is None
        self.rows = torch.as_tensor(
            range(self.num_slots) if rows is None else rows, device=self.device
        )
