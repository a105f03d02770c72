"""Loading a score model by shipped name, folder or hub id."""

from pathlib import Path

import torch

from mara_rl.common.errors import ConfigError, first_line
from mara_rl.llm.policy_llm import DTYPES, DType, placement
from mara_rl.score_models.base import ScoreModel
from mara_rl.score_models.beaver import ARCHITECTURES, load_beaver
from mara_rl.score_models.layer_slice import CONFIG_FILE, load_slice
from mara_rl.score_models.sequence_classifier import load_sequence_classifier
from mara_rl.score_models.weight_files import read_json

_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.model"]
SHIPPED_FOLDER = Path(__file__).parent / "shipped"


def shipped_names() -> list[str]:
    """The names of the score models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED_FOLDER.glob(f"*/{CONFIG_FILE}"))


def load_score_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: DType | None = None,
) -> ScoreModel:
    """Load a frozen score model.

    Args:
        name_or_path: a shipped name (`shipped_names`), a folder (layer slice, beaver or sequence
            classifier, told apart by what it holds) or a hub id of a beaver model or sequence
            classifier.
        device: defaults to the first CUDA device, else the CPU.
        dtype: of the LLM below the score head; defaults to bfloat16 on CUDA, else float32.

    Raises:
        ConfigError: nothing of that name is there.
        DataError: a checkpoint is torn or not a score model; names the field or weight.
    """
    name = str(name_or_path)
    device, dtype = placement(device, dtype)
    folder = score_model_folder(name)
    if (folder / CONFIG_FILE).is_file():
        return load_slice(name, folder, device, dtype)
    architectures = read_json(folder / "config.json").get("architectures") or []
    if any(architecture in ARCHITECTURES for architecture in architectures):
        return load_beaver(name, folder, device, DTYPES[dtype])
    return load_sequence_classifier(name, folder, device, DTYPES[dtype])


def score_model_folder(name: str) -> Path:
    """The folder of a score model by shipped name, folder or hub id (fetched where needed).

    Raises ConfigError when there is none.
    """
    if name in shipped_names():
        return SHIPPED_FOLDER / name
    return Path(name) if Path(name).is_dir() else _from_hub(name)


def _from_hub(name: str) -> Path:
    """The local folder of a hub model's config, weights and tokenizer, fetched where needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"score model {name!r} is neither a shipped name ({', '.join(shipped_names())}), nor a "
            f"folder, nor a hub id that could be fetched: {reason}"
        ) from error
