"""What a model is, by the content of its files: for caches and for reports."""

import hashlib
from pathlib import Path

from mara_rl.llm.policy_llm import SMOLLM2, smollm2_gguf
from mara_rl.score_models.layer_slice import CONFIG_FILE
from mara_rl.score_models.loading import score_model_folder
from mara_rl.score_models.weight_files import read_json

_CHUNK = 1 << 20
_known: dict[tuple[Path, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read once in a process while it does not change."""
    stat = path.stat()
    key = (path.resolve(), stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        _known[key] = digest.hexdigest()
    return _known[key]


def folder_sha256(folder: Path) -> str:
    """A SHA-256 over the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\t{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def llm_sha256(name: str) -> str:
    """Of an LLM's files on this disk; "" for a hub id, which the hub's own cache keeps apart."""
    if name == SMOLLM2:
        return file_sha256(smollm2_gguf())
    path = Path(name)
    if path.is_dir():
        return folder_sha256(path)
    return file_sha256(path) if path.is_file() else ""


def score_model_sha256(name: str) -> str:
    """Of a score model's files and, where it is a slice of an LLM, of that LLM's.

    Raises ConfigError when there is no such model.
    """
    folder = score_model_folder(name)
    own = folder_sha256(folder)
    if not (folder / CONFIG_FILE).is_file():
        return own
    backbone = str(read_json(folder / CONFIG_FILE).get("backbone", SMOLLM2))
    return hashlib.sha256(f"{own}\t{backbone}\t{llm_sha256(backbone)}".encode()).hexdigest()
