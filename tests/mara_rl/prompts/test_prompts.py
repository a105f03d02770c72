import itertools
import re
from collections import Counter
from importlib import resources

import pytest

from mara_rl.common.errors import ConfigError
from mara_rl.prompts import PackagedPrompt, packaged_prompts

TRAIN = packaged_prompts("train")
HELDOUT = packaged_prompts("heldout")


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def overlap(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """Shared trigrams over those of the shorter prompt."""
    return len(a & b) / min(len(a), len(b))


def mix(prompts: list[PackagedPrompt]) -> dict[tuple[str, str], float]:
    counts = Counter((p.kind, p.category) for p in prompts)
    return {key: count / len(prompts) for key, count in counts.items()}


def test_both_splits_are_large_enough_and_have_the_same_mix():
    assert len(TRAIN) >= 300
    assert len(HELDOUT) >= 128
    assert mix(TRAIN) == pytest.approx(mix(HELDOUT))


@pytest.mark.parametrize("prompts", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_half_is_harmful_and_each_kind_has_ten_categories_or_more(prompts):
    kinds = Counter(p.kind for p in prompts)
    assert kinds["harmful"] == kinds["ordinary"]
    for kind in kinds:
        assert len({p.category for p in prompts if p.kind == kind}) >= 10


def test_ids_are_unique_and_name_their_split_and_category():
    assert len({p.id for p in TRAIN + HELDOUT}) == len(TRAIN) + len(HELDOUT)
    for split, prompts in [("train", TRAIN), ("heldout", HELDOUT)]:
        for p in prompts:
            assert re.fullmatch(rf"{split}-{p.category.replace('_', '-')}-\d\d", p.id)


def test_prompts_are_5_to_30_words_without_stray_space():
    for p in TRAIN + HELDOUT:
        assert 5 <= len(p.prompt.split()) <= 30, p
        assert p.prompt == " ".join(p.prompt.split()), p


def test_no_two_prompts_share_more_than_half_their_trigrams():
    prompts = TRAIN + HELDOUT
    pairs = itertools.combinations([(p.id, trigrams(p.prompt)) for p in prompts], 2)
    too_close = [(i, j) for (i, a), (j, b) in pairs if overlap(a, b) > 0.5]
    assert too_close == []


def test_the_overlap_measure_sees_a_filled_in_template():
    a = trigrams("How can I make a pie for my friend without sugar?")
    b = trigrams("how can i make a cake for my friend without eggs")
    assert overlap(a, a) == 1
    assert 0.3 < overlap(a, b) < 1


def test_the_first_words_vary():
    starts = Counter(" ".join(p.prompt.lower().split()[:2]) for p in TRAIN + HELDOUT)
    assert starts.most_common(1)[0][1] <= 0.05 * starts.total()


def test_the_card_states_the_counts_of_every_category():
    card = resources.files("mara_rl.prompts").joinpath("README.md").read_text(encoding="utf-8")
    train, heldout = (Counter((p.category, p.kind) for p in ps) for ps in (TRAIN, HELDOUT))
    assert train.keys() == heldout.keys()
    for category, kind in train:
        counts = train[category, kind], heldout[category, kind]
        assert f"| {category} | {kind} | {counts[0]} | {counts[1]} |" in card


def test_an_unknown_split_is_named():
    with pytest.raises(ConfigError, match=r"'test'.*'train', 'heldout'"):
        packaged_prompts("test")  # type: ignore[arg-type]
