"""mara-rl: token-level accept/reject alignment of frozen LLMs (MARA, arXiv 2505.19743)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mara_rl.decoding.generator import MARAGenerator

__version__ = "0.1.0"
__all__ = ["MARAGenerator", "__version__"]


def __getattr__(name: str) -> Any:
    # torch and transformers are only loaded by those who ask for what needs them.
    if name == "MARAGenerator":
        from mara_rl.decoding.generator import MARAGenerator

        return MARAGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
