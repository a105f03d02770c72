"""Loading LLMs of every kind, and prompts exactly as their chat templates render them."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from tokenizers import AddedToken

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.decoding.text_stream import TextStream
from mara_rl.llm.policy_llm import PolicyLLM, load_policy_llm, smollm2_gguf

# How the families write a conversation, in short; with system and user turn, and what it gives.
LLAMA_3 = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}
{%- set messages = messages[1:] %}{% endif %}{% for m in messages %}[INST]
{{- ' ' }}{% if s is defined and loop.last %}{{ s }}

{% endif %}{{ m['content'] }}[/INST]{% endfor %}"""
QWEN = """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system
Default.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "llama-3": (
        LLAMA_3,
        "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (MISTRAL, "{bos}[INST] Be brief.\n\nHi[/INST]"),
    "qwen": (
        QWEN,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_TURN = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture
def folder(tiny_llms, tmp_path) -> Path:
    """A tiny LLM's folder that a test may change."""
    return Path(shutil.copytree(tiny_llms["llama"], tmp_path / "llm"))


def with_template(folder: Path, template: str | None):
    file = folder / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template, encoding="utf-8")
    return load_policy_llm(str(folder), dtype="float32")


def ids_of(llm: PolicyLLM, text: str) -> list[int]:
    """Token ids of a text as it stands, special tokens by their names."""
    return llm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_golden_ids_of_smollm2(smollm2) -> None:
    # system turn with the template's own prompt, user turn, opening of the assistant's
    system = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28]
    system += [7018, 411, 407, 19712, 8182, 2, 198]
    user = [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert smollm2.prompt_ids("Hi") == system + user
    brief = smollm2.tokenizer("Be brief.")["input_ids"]
    assert smollm2.prompt_ids("Hi", system="Be brief.") == [*system[:3], *brief, 2, 198, *user]
    assert smollm2.eos_ids == {2}


@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_are_what_the_template_writes(folder, family) -> None:
    template, golden = TEMPLATES[family]
    llm = with_template(folder, template)
    text = golden.format(bos=llm.tokenizer.bos_token)
    assert llm.prompt_ids("Hi", system="Be brief.") == ids_of(llm, text)
    assert ("Default." in llm.tokenizer.decode(llm.prompt_ids("Hi"))) == (family == "qwen")


def test_a_system_prompt_where_there_is_no_such_role_is_refused(folder) -> None:
    llm = with_template(folder, GEMMA)
    bos = llm.tokenizer.bos_token
    assert llm.prompt_ids("Hi") == ids_of(llm, bos + GEMMA_TURN)
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    model = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHi<end_of_turn>\n"
    assert llm.chat_ids(turns) == ids_of(llm, bos + model + GEMMA_TURN)
    with pytest.raises(ConfigError, match=r"roles user, user: Conversation roles must alternate"):
        llm.chat_ids([turns[0], turns[0]])
    with pytest.raises(ConfigError, match=r"roles system, user: System role not supported"):
        llm.prompt_ids("Hi", system="Be brief.")


def test_an_llm_without_a_chat_template_is_refused(folder) -> None:
    with pytest.raises(DataError, match="has no chat template; expected an instruction-tuned LLM"):
        with_template(folder, None)


@pytest.mark.slow
def test_a_gguf_file_is_loaded_as_it_is(smollm2) -> None:
    llm = load_policy_llm(str(smollm2_gguf()), dtype="float32")
    assert llm.prompt_ids("Hi") == smollm2.prompt_ids("Hi")
    ids = torch.tensor([llm.prompt_ids("Hi")])
    with torch.inference_mode():
        assert torch.equal(llm.model(ids).logits, smollm2.model(ids).logits)


def test_gguf_files_that_cannot_be_read_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.gguf.*no such file"):
        load_policy_llm(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("not a gguf file")
    with pytest.raises(ConfigError, match=r"text\.gguf") as caught:
        load_policy_llm(str(tmp_path / "text.gguf"))
    assert "\n" not in str(caught.value)
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "otherarch")
    writer.add_context_length(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"other\.gguf.*otherarch"):
        load_policy_llm(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\x10", "SafetensorError"),
        ("tokenizer.json", b"{}", "KeyError"),
        ("config.json", b"{", "not a valid JSON file"),
        ("chat_template.jinja", b"{% for", "chat template refuses messages of roles user: unexp"),
        ("chat_template.jinja", b"{{ a.b.c }}", "refuses messages of roles user: 'a' is undefined"),
    ],
)
def test_damaged_files_are_one_line(folder, file, content, message) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy_llm(str(folder), dtype="float32")
    assert "\n" not in str(caught.value)


def test_every_token_that_ends_a_turn_ends_an_answer(folder) -> None:
    llm = load_policy_llm(str(folder), dtype="float32")
    assert llm.eos_ids == {2}
    turns = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    llm.tokenizer.add_tokens(AddedToken("<|turn|>", special=True))
    llm.tokenizer.chat_template = turns
    llm.tokenizer.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**generation, "eos_token_id": [2, 7]})
    )
    llm = load_policy_llm(str(folder), dtype="float32")
    turn = llm.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert llm.eos_ids == {2, 7, turn}


def test_a_template_without_assistant_turns_is_taken(folder) -> None:
    refuses = "{% if m['role'] == 'assistant' %}{{ raise_exception('none') }}{% endif %}"
    llm = with_template(
        folder, "{% for m in messages %}" + refuses + "{{ m['content'] }}{% endfor %}"
    )
    assert llm.eos_ids == {2}
    assert llm.prompt_ids("Hi") == ids_of(llm, "Hi")


def test_half_a_character_is_no_prompt(smollm2) -> None:
    with pytest.raises(ConfigError, match="the user's message is not valid text at character 2"):
        smollm2.prompt_ids("a \udcff")


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "some/llm"])
def test_llms_that_are_not_there_are_named(name) -> None:
    with pytest.raises(ConfigError, match=f"llm '{name}' could not be loaded") as caught:
        load_policy_llm(name)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_sentencepiece_alone(folder, tmp_path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    sentences = ["hello world how are you", "the cat sat on the mat", "naïve café 你好"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=310,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    shutil.move(tmp_path / "tokenizer.model", folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]"
        "{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = load_policy_llm(str(folder), dtype="float32")
    ids = llm.prompt_ids("hello world")
    assert ids.count(llm.tokenizer.bos_token_id) == 1
    assert llm.text(ids) == "[INST] hello world [/INST]"
    text = "hello naïve 你好 the cat 🙂"
    stream = TextStream(llm)
    pieces = [
        stream.push(token) for token in llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert "".join([*pieces, stream.finish()]) == text
    assert sum(map(bool, pieces)) > 3
