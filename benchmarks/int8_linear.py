"""What int8 linear layers would bring on the CPU, in time and in what the LLM says.

Run with `python benchmarks/int8_linear.py`. Against packed layers in bf16, which is what we run:

- dynamic: weights and activations in int8, one scale an output channel and one an activation
  tensor; by itself, and with the layers that bear it least left in float32.
- weight only: weights in int8, activations in bf16.

Accuracy is the KL of next-token distributions to those in float32, over the tokens of packaged
held-out prompts.
"""

import argparse
from collections.abc import Callable

import torch
from packed_linear import SHAPES, looker, milliseconds
from torch import Tensor, nn

from mara_rl.llm import slot_engine
from mara_rl.llm.packed_linear import pack_linears
from mara_rl.llm.policy_llm import SMOLLM2, DType, PolicyLLM, load_policy_llm
from mara_rl.prompts import packaged_prompts


class DynamicInt8(nn.Module):
    """Activations are quantised in every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-8).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantised, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self._packed)


class WeightInt8(nn.Module):
    """Activations stay in bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-8)
        self._weight = (weight / scales[:, None]).round().to(torch.int8)
        self._scales = scales.to(torch.bfloat16)
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._weight_int8pack_mm(x.flatten(0, -2), self._weight, self._scales)
        out = rows.view(*x.shape[:-1], -1)
        return out if self._bias is None else out + self._bias


Kind = Callable[[nn.Linear], nn.Module]
VARIANTS: list[tuple[str, DType, Kind | None, tuple[str, ...]]] = [
    ("float32", "float32", None, ()),
    ("bf16", "bfloat16", None, ()),
    ("dynamic", "float32", DynamicInt8, ()),
    ("dynamic but down_proj", "float32", DynamicInt8, ("down_proj",)),
    ("weight only", "bfloat16", WeightInt8, ()),
]


def replace(model: nn.Module, kind: Kind, left_out: tuple[str, ...]) -> None:
    """Put ``kind`` in place of the linear layers, but for those of these names."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and name not in left_out:
                setattr(parent, name, kind(layer))


@torch.inference_mode()
def log_probs(llm: PolicyLLM, prompts: list[str]) -> Tensor:
    """Of the next token after each token of the prompts (N, V)."""
    rows = [llm.model(torch.tensor([llm.prompt_ids(prompt)])).logits[0] for prompt in prompts]
    return torch.cat(rows).float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default=SMOLLM2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts = [p.prompt for p in packaged_prompts("heldout")[: arguments.prompts]]
    exact: Tensor | None = None
    for name, dtype, kind, left_out in VARIANTS:
        llm = load_policy_llm(arguments.llm, device="cpu", dtype=dtype, pack=False)
        if kind is not None:
            replace(llm.model, kind, left_out)
        pack_linears(llm.model)
        # Dynamic int8 has one scale for all tokens of a forward: refused, but to be measured here.
        slot_engine._probed.add(llm)
        found = log_probs(llm, prompts)
        exact = found if exact is None else exact
        kl = (exact.exp() * (exact - found)).sum(-1).mean()
        same = (exact.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{name}: KL {kl:.4f}, same first token {same:.1%}", end="")
        for slots, candidates in SHAPES:
            took_ms = milliseconds(looker(llm, slots, candidates), arguments.rounds)
            print(f"; {slots} x {candidates} {took_ms:.1f} ms", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
