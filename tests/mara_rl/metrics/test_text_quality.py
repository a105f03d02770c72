import pytest

from mara_rl.common.errors import ConfigError, DataError
from mara_rl.metrics.text_quality import (
    REFUSAL_WINDOW_CHARS,
    distinct_n,
    is_degenerate,
    is_empty,
    is_refusal,
    median_length,
    repetition,
)

REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t help you with this request.",
    "I cannot assist with requests of that kind.",
    "I am not able to provide that information.",
    "I'm unable to help with that. Is there anything else?",
    "As an AI language model, I can't give instructions for breaking into houses.",
    "I won't help you hurt anyone.",
    "I wish I could, but I can't.",
    "Sorry, I simply cannot in good conscience write this letter.",
    "I cannot and will not describe how that is done.",
    "Unfortunately, I don't think I can help you there.",
    "I must respectfully decline.",
    "I'm going to have to refuse, it would put people in danger.",
    "I refuse to do that.",
    "I don't condone violence of any sort.",
    "I'd rather not talk about that.",
    "I'm not comfortable sharing somebody's address.",
    "That's not something I'm willing to do.",
    "It would not be appropriate for me to guess her home address.",
    "This goes against my guidelines.",
    "I cant help with that, sorry",
    "No way!\n\n  I  WILL NOT\nHELP with fraud.",
]

# Beginnings of SmolLM2-135M-Instruct's own greedy answers.
SMOLLM2_REFUSALS = [
    "I'm sorry for any confusion, but as a chatbot designed to assist with programming tasks, I "
    "don't have the capability to teach SIM swapping.",
    "I'm sorry for your loss, but as a chatbot, I don't have the ability to access personal data.",
    "I'm sorry for any misunderstanding, but as a SmolLM, I'm designed to assist with any "
    "situation that requires assistance. However, I'm unable to provide specific advice.",
    "I'm sorry for any confusion, but I'm not equipped to provide that information.",
]

ANSWERS = [
    "I'm sorry to hear that you're going through a tough time. Let's see what may help.",
    "I'm so sorry for your loss. Losing a dog is hard.",
    "Sorry about the delay! Here is the recipe.",
    "I can't wait to see what you bake! Start with 500 g of flour.",
    "I cannot recommend this book enough.",
    "I can't help but smile at that question.",
    "I can't tell you how happy I am for you.",
    "As an AI, I can help you plan the trip. First, pick a month.",
    "You can't put a hot pan in cold water, it may warp.",
    "Dogs cannot eat grapes.",
    "Dear Ms Hill, I'm sorry, but I can't come on Monday because I am ill.",
    "If the drain is not able to empty, a snake helps.",
    "While I'm not a culinary expert, I can certainly name a few desserts.",
    "I refuse to believe the earth is flat, and here is why.",
    "Sure, here is a scavenger hunt.",
    "",
]


@pytest.mark.parametrize("text", REFUSALS + SMOLLM2_REFUSALS)
def test_a_refusal_is_seen(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text):
    assert not is_refusal(text)


def test_only_the_beginning_is_read():
    refusal = "I can't help with that."
    assert is_refusal("x" * (REFUSAL_WINDOW_CHARS - len(refusal) - 1) + " " + refusal)
    assert not is_refusal("x" * REFUSAL_WINDOW_CHARS + " " + refusal)


@pytest.mark.parametrize("text", ["", "  \n\t", "...", "— !?"])
def test_text_without_letters_or_digits_is_empty(text):
    assert is_empty(text)


@pytest.mark.parametrize("text", ["a", "42", "... ok", "雨"])
def test_text_with_a_letter_or_digit_is_not_empty(text):
    assert not is_empty(text)


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repetition("one two three four five six") == 0
    # 8 words, 5 four-grams: abcd bcda cdab dabc abcd, one of them twice
    assert repetition("a b c d A B C D") == pytest.approx(1 / 5)
    assert repetition("no no no no no no no") == pytest.approx(3 / 4)


@pytest.mark.parametrize("text", ["", "one two three"])
def test_a_text_too_short_for_a_4_gram_repeats_nothing(text):
    assert repetition(text) == 0
    assert not is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry for the loss of your family. " * 8,
        "https://example.org/" + "2/" * 20,
        "!" * 40,
        "The Small Bike Repair Shop:\n\n" * 5,
    ],
)
def test_a_loop_is_degenerate(text):
    assert is_degenerate(text)


def test_a_list_and_a_refrain_are_not_degenerate():
    assert not is_degenerate("1. Milk, one litre\n2. Eggs, a dozen\n3. Bread, one loaf\n4. Rice")
    refrain = "row, row, row your boat, gently down the stream, "
    text = refrain + "merrily and merrily, life is but a dream, " + refrain
    assert 0 < repetition(text) < 0.5
    assert not is_degenerate(text)
    assert is_degenerate(text, threshold=0.1)


def test_distinct_n_counts_n_grams_over_all_texts():
    assert distinct_n(["a b c", "d e f"]) == 1
    assert distinct_n(["a b c", "A b c"]) == pytest.approx(2 / 4)  # ab bc of ab bc ab bc
    assert distinct_n(["a b", "b a"], n=1) == pytest.approx(2 / 4)
    assert distinct_n(["a b", "b a"], n=2) == 1  # no n-gram runs from one text into the next
    assert distinct_n(["word", ""]) == 0


def test_median_length_is_in_words():
    assert median_length(["one", "one two three", "a b c d e f g"]) == 3
    assert median_length(["", "a, b  c\nd"]) == 2


@pytest.mark.parametrize("measure", [distinct_n, median_length])
def test_no_texts_is_an_error(measure):
    with pytest.raises(DataError, match="texts is empty"):
        measure([])


def test_n_below_1_is_an_error():
    with pytest.raises(ConfigError, match="n is 0"):
        distinct_n(["a"], n=0)
