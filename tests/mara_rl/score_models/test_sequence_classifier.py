import pytest
import torch
from tiny_checkpoints import TEXTS, tiny_tokenizer, write_classifier
from transformers import LlamaForSequenceClassification

from mara_rl.common.errors import DataError
from mara_rl.score_models.loading import load_score_model


def test_scores_are_the_logit_of_the_chat(tmp_path):
    folder = write_classifier(tmp_path / "classifier", num_labels=1)
    plain = LlamaForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for prompt, response in TEXTS:
        chat = (
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        )
        ids = tiny_tokenizer()(chat, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(plain(torch.tensor([ids])).logits.item())
    model = load_score_model(folder, device="cpu")
    assert model.score(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert model.score_type == "reward"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batching_changes_nothing_whatever_the_padding_side(tmp_path, side):
    model = load_score_model(write_classifier(tmp_path / "c", num_labels=1), device="cpu")
    model.tokenizer.padding_side = side
    alone = [model.score([text])[0] for text in TEXTS]
    assert model.score(TEXTS) == pytest.approx(alone, abs=1e-5)


def test_more_than_one_logit_is_refused(tmp_path):
    folder = write_classifier(tmp_path / "classifier", num_labels=3)
    with pytest.raises(DataError, match="3 logits; expected 1"):
        load_score_model(folder, device="cpu")


def test_causal_llm_without_score_weights_is_refused(tiny_llm):
    with pytest.raises(DataError, match=r"score\.weight"):
        load_score_model(tiny_llm, device="cpu")


def test_missing_chat_template_is_refused(tmp_path):
    folder = write_classifier(tmp_path / "classifier", num_labels=1)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="chat template"):
        load_score_model(folder, device="cpu")
