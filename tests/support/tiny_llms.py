"""Tiny random LLMs with a character tokenizer and a chat template, saved as model folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # Large enough that logits differ and candidate sets vary in size.
    "initializer_range": 0.4,
}
WINDOW = 6  # shorter than any prompt
# Gemma-2 and Qwen-3 have a head size of their own; Gemma-2 and Qwen-2 mix windowed and full layers.
MAKERS: dict[str, Callable[[int], Any]] = {
    "llama": lambda vocab: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **SIZES)),
    "mistral": lambda vocab: MistralForCausalLM(
        MistralConfig(vocab_size=vocab, sliding_window=WINDOW, **SIZES)
    ),
    "gemma2": lambda vocab: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab,
            head_dim=12,
            query_pre_attn_scalar=16,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
            **SIZES,
        )
    ),
    "qwen2": lambda vocab: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
            **SIZES,
        )
    ),
    "qwen3": lambda vocab: Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, head_dim=12, **SIZES)),
}


def save_tiny_llms(folder: Path) -> dict[str, Path]:
    """One folder per architecture under ``folder``."""
    tokenizer = _tokenizer()
    folders = {}
    for name, make in MAKERS.items():
        torch.manual_seed(1)
        folders[name] = folder / name
        make(len(tokenizer)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
