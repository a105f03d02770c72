"""mara-rl: token-level accept/reject alignment of frozen LLMs (MARA, arXiv 2505.19743)."""

__version__ = "0.1.0"
