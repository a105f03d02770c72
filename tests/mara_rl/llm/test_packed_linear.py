import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mara_rl.llm.packed_linear import PackedLinear, pack_linears


def packed(linear: nn.Linear) -> nn.Module:
    model = nn.Sequential(linear)
    pack_linears(model)
    return model[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 48)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_computes_what_the_plain_layer_does(dtype, tolerance, shape, bias):
    linear = nn.Linear(48, 20, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        layer = packed(linear)
        assert isinstance(layer, PackedLinear)
        out = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, linear(x), rtol=tolerance, atol=tolerance)


def test_other_dtypes_and_layers_stay_as_they_are():
    assert type(packed(nn.Linear(4, 4, dtype=torch.float64))) is nn.Linear
    embedding = nn.Sequential(nn.Embedding(4, 4))
    pack_linears(embedding)
    assert isinstance(embedding[0], nn.Embedding)


def test_an_output_layer_tied_to_the_embedding_keeps_the_embedding(tiny_llms):
    model = AutoModelForCausalLM.from_pretrained(tiny_llms["gemma2"], dtype=torch.float32).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(ids).logits
        pack_linears(model)
        assert isinstance(model.get_output_embeddings(), PackedLinear)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
