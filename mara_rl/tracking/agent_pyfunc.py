"""The MLflow model of an agent (models from code): stored with each version, run by MLflow.

Needs mlflow (with its numpy) and torch alone, so that anyone with these can load an agent from the
registry. It therefore repeats `AcceptNetwork` in a few lines instead of importing it, and reads the
weights by itself.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from torch import Tensor
from torch.nn import functional as F


class AcceptModel(PythonModel):
    """Accept probabilities (N,), float32, of N candidates.

    Input: a dict of float32 arrays ``h`` (N, H), the LLM's last hidden state at each candidate;
    ``base_logit`` (N,), logit of the LLM's own acceptance probability; for heads ``relative`` and
    ``advantage`` also ``h_prefix`` (N, H), the state of the last accepted token.
    """

    def load_context(self, context: PythonModelContext) -> None:
        spec = json.loads(Path(context.artifacts["spec"]).read_text(encoding="utf-8"))
        self.head = spec["agent"]["head"]
        self.weights = _tensors(Path(context.artifacts["weights"]))

    # The hint says "no schema to be had from hints" to MLflow, which warns about any other; what
    # comes is a dict of arrays, checked against the logged signature.
    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        inputs = {name: torch.as_tensor(np.asarray(model_input[name])) for name in model_input}
        with torch.inference_mode():
            logit, _ = self._terms(inputs["h"])
            if self.head in ("relative", "advantage"):
                logit = logit - self._terms(inputs["h_prefix"])[1]
            if self.head != "paper":
                logit = logit + inputs["base_logit"].float()
            return torch.sigmoid(logit).numpy()

    def _terms(self, h: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weights
        z = F.layer_norm(h.float(), h.shape[-1:], w["ln.weight"], w["ln.bias"])
        z = torch.relu(F.linear(z, w["linear1.weight"], w["linear1.bias"]))
        z = torch.relu(F.linear(z, w["linear2.weight"], w["linear2.bias"]))
        logits = F.linear(z, w["output_linear.weight"], w["output_linear.bias"])
        if self.head == "advantage":
            return logits[..., 1], logits[..., 0]
        own = logits[..., 1] - logits[..., 0]
        return own, own


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all float32. Raises ValueError where they are not."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for key, about in header.items():
        if about["dtype"] != "F32":
            raise ValueError(f"{path}: {key} is {about['dtype']}; expected F32")
        begin, end = (start + offset for offset in about["data_offsets"])
        values = np.frombuffer(content[begin:end], "<f4").reshape(about["shape"])
        tensors[key] = torch.from_numpy(values.copy())
    return tensors


mlflow.models.set_model(AcceptModel())
