"""The card (``README.md``) of an exported agent, as the model hub shows it."""

import json
from typing import Any

import yaml

from mara_rl.agents.agent import AgentSpec

_HEADS = {
    "paper": "accept log-odds = MLP(h_k), the published agents' shape",
    "anchored": "accept log-odds = logit r_k + MLP(h_k), r_k the LLM's own acceptance probability",
    "relative": "accept log-odds = logit r_k + g(h_k) − g(h_prefix), r_k the LLM's own acceptance "
    "probability",
    "advantage": "accept log-odds = logit r_k + q(h_k) − v(h_prefix), q and v the outputs of one "
    "MLP, r_k the LLM's own acceptance probability",
}

_EXACT = ", all candidates looked at and re-weighted: π(t_k) ∝ p_k e^{term_k}"


def agent_card(spec: AgentSpec, metadata: dict[str, Any]) -> str:
    """Markdown with the front matter of the hub; ``metadata`` goes in whole, as JSON."""
    head: dict[str, Any] = {"library_name": "mara-rl", "tags": ["mara", "alignment"]}
    if spec.llm:
        head["base_model"] = spec.llm
    llm = spec.llm or "<its LLM>"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# Accept/reject agent for {spec.llm or "an LLM it does not name"}

A small network that reads the frozen LLM's hidden state for each candidate token and accepts or
rejects it (MARA, arXiv 2505.19743). It aligns the LLM without touching its weights.

| | |
|---|---|
| hidden size of the LLM | {spec.hidden_size} |
| head | `{spec.head}`: {_HEADS[spec.head]} |
| rule | `{spec.rule}`, fallback `{spec.fallback}`{_EXACT if spec.exact else ""} |
| candidates | top-k {spec.top_k}, then top-p {spec.top_p} |

```python
from mara_rl import MARAGenerator

mara = MARAGenerator("path/of/this/folder", "{llm}")
print(mara.get_proxy_output("Please introduce yourself.", max_new_tokens=256)["answer"])
```

Weights: `agent.safetensors`; everything else that fixes what the agent does: `agent.json`.

```json
{json.dumps(metadata, indent=2, ensure_ascii=False)}
```
"""
