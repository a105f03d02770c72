"""CUDA graphs of small forwards over all slots: they cost what the GPU does, not what starts it."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mara_rl.errors import first_line
from mara_rl.slot_attention import Layout
from mara_rl.slot_forward import FIELDS, SlotForward

logger = logging.getLogger(__name__)

MAX_TOKENS = 256
"""Up to about here a forward is bound by the weights it reads, so padding costs little."""
MAX_DIFFERENCE = 0.02
"""Of a graph's hidden state from the forward's, relative to it: some roundings of bfloat16."""

Forward = Callable[[Tensor], Tensor]
Capture = Callable[[Forward, Tensor], Forward]
"""Makes something faster, for inputs of one shape, of a forward and an example of its input."""


def cuda_graph(forward: Forward, example: Tensor) -> Forward:
    """``forward`` as a CUDA graph; its result is overwritten when it runs again."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = forward(example)

    def replay(fields: Tensor) -> Tensor:
        example.copy_(fields)
        graph.replay()
        return result

    return replay


class SlotGraphs:
    """Forwards of up to W tokens in each of S slots, padded to few shapes, captured once each.

    Tokens of padding write to the cache's spare place, see the first one, and are not given back.

    A graph is used if it gives what the forward that it was captured from gave.

    Attributes:
        max_tokens: forwards larger than this, padding included, are left to others; so are all
            once an LLM turns out to do what cannot be captured (wait for the GPU, say).
        captured: how many graphs there are.
    """

    def __init__(
        self,
        forward: SlotForward,
        num_slots: int,
        device: torch.device,
        *,
        capture: Capture = cuda_graph,
    ) -> None:
        self.max_tokens = MAX_TOKENS
        self._forward = forward
        self._num_slots = num_slots
        self._device = device
        self._capture = capture
        self._graphs: dict[tuple[int, int], Forward] = {}
        self._capacity = 0

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def run(self, fields: Tensor, column: Tensor, width: int, longest: int) -> Tensor | None:
        """Hidden states (N, H) of N tokens, or None where this is not for graphs.

        ``fields`` (6, N), CPU, are what `SlotForward` takes. ``column`` (N,) numbers each slot's
        tokens, up to ``width``; ``longest`` is the greatest place written or seen, plus 1.
        """
        width = 1 << (width - 1).bit_length()
        if self._num_slots * width > self.max_tokens:
            return None
        cache = self._forward.cache
        cache.reserve(longest)
        if cache.capacity != self._capacity:  # keys and values move
            self._graphs.clear()
            self._capacity = cache.capacity
        where = fields[FIELDS.index("slot")] * width + column
        padded = self._padding(width)
        padded[:, where] = fields
        key, given, at = (width, cache.view), padded.to(self._device), where.to(self._device)
        if key in self._graphs:
            return self._graphs[key](given)[at]
        layout = Layout.whole(self._num_slots, width, self._device)

        def forward(fields: Tensor) -> Tensor:
            return self._forward(fields, layout, None)

        expected = forward(given)[at]
        try:
            graph = self._capture(forward, given.clone())
            self._check(graph(given)[at], expected)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("this LLM runs without CUDA graphs: %s", first_line(error))
            self.max_tokens = 0
        else:
            self._graphs[key] = graph
        return expected

    @staticmethod
    def _check(found: Tensor, expected: Tensor) -> None:
        """Raise RuntimeError unless a graph's states are the forward's, up to rounding."""
        found, expected = found.float(), expected.float()
        close = (found - expected).norm(dim=-1) <= MAX_DIFFERENCE * expected.norm(dim=-1)
        if not (close | ~expected.isfinite().all(-1)).all():
            raise RuntimeError("a graph's hidden states are not those of the forward")

    def _padding(self, width: int) -> Tensor:
        """Fields (6, S · W) of padding alone."""
        slot = torch.arange(self._num_slots).repeat_interleave(width)
        none = torch.zeros_like(slot)
        values = {
            "token": none,
            "slot": slot,
            "place": none + self._forward.cache.capacity,  # the spare one
            "behind": none + 1,
            "parent": none - 1,
            "position": none,
        }
        return torch.stack([values[field] for field in FIELDS])
