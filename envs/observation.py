"""What the agent sees of a pending candidate.

S slots, H hidden size. ``h`` and ``h_prefix`` are float16 (the LLM's state is rounded), or bfloat16
carried as int16 bits where a training config asks for it, since numpy has no bfloat16.
"""

from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

X_FIELDS = ("base_logit", "log_p", "k", "mass_left", "tokens_left", "forced")
"""The scalars ``x`` of an observation: logit r_k, log p_k, the candidate's index k (0 first), the
mass Σ_{j≥k} p_j, the tokens left until the length cap, and 1 where there is no choice."""
BASE_LOGIT, LOG_P, K, MASS_LEFT, TOKENS_LEFT, FORCED = range(len(X_FIELDS))

StateDType = Literal["float16", "bfloat16_bits"]


def observation_space(hidden_size: int, *, prefix: bool, state_dtype: StateDType) -> spaces.Dict:
    """The space of one slot's observation; ``prefix`` adds ``h_prefix``."""
    if state_dtype == "float16":
        state = spaces.Box(-np.inf, np.inf, (hidden_size,), np.float16)
    else:
        low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
        state = spaces.Box(low, high, (hidden_size,), np.int16)
    parts: dict[str, spaces.Space] = {
        "h": state,
        "x": spaces.Box(-np.inf, np.inf, (len(X_FIELDS),), np.float32),
    }
    if prefix:
        parts["h_prefix"] = state
    return spaces.Dict(parts)


def encode_state(h: Tensor, state_dtype: StateDType) -> np.ndarray:
    """Hidden states (S, H) of any float dtype as a fresh array of the observation's dtype."""
    if state_dtype == "float16":
        # bfloat16 reaches further than float16: clip, so that a large state is not infinite.
        limit = torch.finfo(torch.float16).max
        return h.float().clamp(-limit, limit).half().cpu().numpy().copy()
    return h.bfloat16().view(torch.int16).cpu().numpy().copy()


def decode_state(state: Tensor) -> Tensor:
    """The inverse of `encode_state` on tensors (…, H): float32."""
    return (state.view(torch.bfloat16) if state.dtype == torch.int16 else state).float()
