"""Linear layers of a frozen LLM with weights laid out once for the CPU's matrix kernels."""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """What an ``nn.Linear`` computes, from a copy of its weight in oneDNN's own layout.

    The plain layer brings its weight into that layout in every call. Results differ by rounding
    alone. For inference on the CPU: no gradients, and the weight can be neither saved nor moved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the weight's dtype."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Put `PackedLinear` in place of the model's linear layers, where the CPU's kernels take them.

    A model on another device, or of a dtype they do not know, is left as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _packable(layer.weight):
                setattr(parent, name, PackedLinear(layer))


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu":
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32
