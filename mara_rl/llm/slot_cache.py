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
        """Write (1, heads, N, D) where the cache aims; return the keys and values of its rows."""
        cache = self.cache
        if not self.is_initialized or self.keys.shape[2] < cache.capacity:
            self.lazy_initialization(key_states, value_states)
        at = (cache.slots, slice(None), cache.places)  # (N, heads, D)
        self.keys[at] = key_states[0].transpose(0, 1)
        self.values[at] = value_states[0].transpose(0, 1)
        keys, values = self.keys[:, :, : cache.view], self.values[:, :, : cache.view]
        return (keys, values) if cache.rows is None else (keys[cache.rows], values[cache.rows])

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
        self.rows: Tensor | None = None
        self.slots = torch.zeros(0, dtype=torch.long, device=device)
        self.places = torch.zeros(0, dtype=torch.long, device=device)

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

    def move(self, slots: Tensor, sources: Tensor, targets: Tensor) -> None:
        """Copy one key and value within each of these slots (R,), from source to target place."""
        slot_layers: list[Any] = self.layers
        for layer in slot_layers:
            layer.keys[slots, :, targets] = layer.keys[slots, :, sources]
            layer.values[slots, :, targets] = layer.values[slots, :, sources]

    def aim(self, slots: Tensor, places: Tensor, longest: int, rows: Tensor | None) -> None:
        """Set the target of the next forward.

        Args:
            slots, places: where the keys and values of the N tokens go (N,), int64, on the device.
            longest: the greatest place any token looks at, plus 1.
            rows: the slots whose keys the attention needs (R,), in order; None means all.
        """
        self.view = -(-longest // 32) * 32
        self.capacity = max(self.capacity, -(-self.view // CAPACITY_STEP) * CAPACITY_STEP)
        self.slots, self.places, self.rows = slots, places, rows
