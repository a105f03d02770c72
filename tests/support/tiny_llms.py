"""Tiny random LLMs with a character tokenizer and a chat template, saved as model folders."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
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


def save_tiny_llms(folder: Path) -> dict[str, Path]:
    """One folder per architecture under ``folder``."""
    tokenizer = _tokenizer()
    vocab = len(tokenizer)
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **SIZES)),
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(vocab_size=vocab, sliding_window=6, **SIZES)
        ),
    }
    folders = {}
    for name, make in makers.items():
        torch.manual_seed(1)
        folders[name] = folder / name
        make().save_pretrained(folders[name])
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
