"""Tiny checkpoints with random weights, in the formats of the published ones."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    ("What is rain?", "Water that falls."),
    ("Hi", ""),
    ("Tell me a long story about a fox, please.", "Once there was a fox who " * 6),
    ("a b c", "d"),
    ("Why?", "Because it is so, and was so before."),
]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a character; what is no printable ASCII character is ``<unk>``."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )


def tiny_config(**fields: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **fields,
    )


class BeaverFolder:
    """A beaver checkpoint whose parts a test can change before `write`."""

    def __init__(self, path: Path, **fields: object) -> None:
        torch.manual_seed(0)
        self.path = path
        self.llama_config = tiny_config()
        self.llama = LlamaModel(self.llama_config).eval()
        self.fields = {"score_dim": 1, "score_bias": True, "do_normalize": False} | fields
        self.state = {f"model.{key}": value for key, value in self.llama.state_dict().items()}
        self.state["score_head.weight"] = torch.randn(1, 32)
        if self.fields["score_bias"]:
            self.state["score_head.bias"] = torch.randn(1)
        self.state["normalizer.mean"] = torch.tensor([0.7])
        self.state["normalizer.var"] = torch.tensor([4.0])
        self.state["normalizer.count"] = torch.tensor([1000])

    def write(self, files: str = "safetensors") -> Path:
        """Write the folder; ``files`` is safetensors, bin, or one of them with -sharded."""
        self.path.mkdir()
        config = self.llama_config.to_dict() | {"architectures": ["LlamaForScore"]} | self.fields
        (self.path / "config.json").write_text(json.dumps(config))
        tiny_tokenizer(None).save_pretrained(self.path)
        kind, _, sharded = files.partition("-")
        stem = "model" if kind == "safetensors" else "pytorch_model"
        keys = sorted(self.state)
        shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if sharded else [keys]
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"{stem}-{number:05d}-of-00002.{kind}" if sharded else f"{stem}.{kind}"
            state = {key: self.state[key].contiguous() for key in shard}
            if kind == "safetensors":
                save_file(state, self.path / name)
            else:
                torch.save(state, self.path / name)
            weight_map |= dict.fromkeys(shard, name)
        if sharded:
            index = {"metadata": {}, "weight_map": weight_map}
            (self.path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
        return self.path

    def reference(self, prompt: str, response: str) -> float:
        """The head's output at the last token, computed one text at a time."""
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
        ids = torch.tensor([tiny_tokenizer(None)(text)["input_ids"]])
        with torch.no_grad():
            hidden = self.llama(ids).last_hidden_state[0, -1]
            score = hidden @ self.state["score_head.weight"][0]
            if self.fields["score_bias"]:
                score = score + self.state["score_head.bias"][0]
        return float(score)


def write_llm(folder: Path) -> Path:
    """A chat LLM of three layers."""
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(pad_token_id=3, eos_token_id=5)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_classifier(folder: Path, **fields: object) -> Path:
    torch.manual_seed(2)
    model = LlamaForSequenceClassification(tiny_config(pad_token_id=3, **fields))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def deepened(folder: Path, target: Path, layers: int) -> Path:
    """A copy of a checkpoint with so many layers: slow, the new ones change nothing."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    for key in [key for key in state if key.startswith("model.layers.")]:
        number, rest = key.removeprefix("model.layers.").split(".", 1)
        added = state[key]
        if rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):  # all that a layer adds
            added = torch.zeros_like(added)
        depth = config["num_hidden_layers"]
        for copy in range(int(number) + depth, layers, depth):
            state[f"model.layers.{copy}.{rest}"] = added.clone()
    save_file(state, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    return target
