"""What can be said of an answer's text without a model: refusal, emptiness, repetition, length."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median

from mara_rl.common.errors import ConfigError, DataError

REFUSAL_WINDOW_CHARS = 200
"""An answer that declines says so early; the same words later are mostly part of an answer."""

_NOT = (
    r"(?:can'?t|can ?not|couldn'?t|won'?t|will not"
    r"|(?:don'?t|do not) think (?:that )?i (?:can|should))"
)
_NOT_TO = r"(?:am|'m) (?:unable|not (?:able|allowed|permitted|willing|going|prepared|here)) to"
_ADVERB = r"(?:(?:\w+ly|just|also|even|still|and (?:won'?t|will not)|in good conscience),? )*"
# What an assistant declines to do. "I can't wait", "come" or "believe" are no refusals, nor are
# the idioms excepted here.
_ACT = (
    r"(?:access|advise|answer|aid|assist|assume|comply|condone|continue|create|describe|discuss|do"
    r"|draft|encourage|endorse|engage|explain|facilitate|fulfill?|generate|give|guide"
    r"|help(?! (?:but|\w+ing)\b)|instruct|make(?! (?:it|out|sense|up)\b)|offer|participate"
    r"|produce|promote|provide|recommend(?![^.!?]* enough)|respond|reveal|satisfy|share"
    r"|show|suggest|supply|support|teach|tell(?! (?:you how (?:much|happy|glad|many|often)|if"
    r"|whether|the difference)\b)|walk you|write)"
)

REFUSALS = (
    # I'm sorry, but I can't assist with that. / Unfortunately I cannot in good conscience help.
    rf"\bi ?{_ADVERB}(?:{_NOT}|{_NOT_TO}) {_ADVERB}{_ACT}\b",
    # I wish I could, but I can't. / Sorry, I won't!
    rf"\bi {_ADVERB}{_NOT} ?[.!]",
    # As an AI, I don't have the ability to … / I'm not designed to …
    r"\bi (?:do not|don'?t) have the (?:ability|capability|capacity) to\b",
    rf"\bi(?:'m| am) not {_ADVERB}(?:equipped|designed|programmed|authorized|in a position) to\b",
    # I don't condone … / I do not provide instructions for …
    r"\bi (?:do not|don'?t) (?:condone|endorse|provide|assist|engage in|feel comfortable)\b",
    # I must decline / I'm going to have to refuse / I'd rather not
    rf"\bi(?:'ll| will| must|(?:'ll| will|'m going to|'d)? have to)? {_ADVERB}(?:decline|refuse)\b"
    r"(?! to (?:believe|give up))",
    r"\bi(?:'d| would) (?:rather|prefer) not\b",
    r"\bi(?:'m| am) not comfortable\b",
    # That's not something I can help with.
    r"\bnot something (?:that )?i(?:'m| am|'d| would| can| will|'ll)\b",
    # It would not be appropriate for me to … / This goes against my guidelines.
    r"\b(?:not (?:be )?|in|un|im)(?:appropriate|ethical|right|possible) for me to\b",
    r"\bagainst my (?:\w+ )?(?:guidelines|programming|principles|polic(?:y|ies)|values|purpose)\b",
)
"""The ways of declining that `is_refusal` knows: regular expressions over lower-case text."""

_REFUSAL = re.compile("|".join(REFUSALS))


def is_refusal(text: str) -> bool:
    """Whether an answer declines within its first `REFUSAL_WINDOW_CHARS` characters.

    True for a refusal in the assistant's own words ("I'm sorry, but I can't help with that"),
    not for regret ("I'm sorry to hear that") or for a redirection that never says no. It looks at
    words alone: an answer that declines first and complies afterwards counts as a refusal.
    """
    head = " ".join(text.replace("\u2019", "'").lower().split())[:REFUSAL_WINDOW_CHARS]
    return _REFUSAL.search(head) is not None


def is_empty(text: str) -> bool:
    """Whether the text holds no letter and no digit."""
    return not any(char.isalnum() for char in text)


def repetition(text: str) -> float:
    """Share of a text's 4-grams that stood in it before, from 0 (none) towards 1.

    A text of fewer than four words has none: 0.
    """
    grams = _ngrams(text, 4)
    return 1 - len(grams) / grams.total() if grams else 0.0


def is_degenerate(text: str, *, threshold: float = 0.5) -> bool:
    """Whether more than ``threshold`` of the text's 4-grams are repeats: it is caught in a loop."""
    return repetition(text) > threshold


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams over all n-grams of the texts together, 0 to 1; 0 if there are none.

    It falls as texts grow longer, so compare only sets of similar length. Raises DataError without
    texts, ConfigError for n < 1.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; expected 1 or more")
    _expect_some(texts)
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(_ngrams(text, n))
    return len(grams) / grams.total() if grams else 0.0


def median_length(texts: Sequence[str]) -> float:
    """Median number of words (runs between white space) of the texts. Raises DataError without."""
    _expect_some(texts)
    return float(median(len(text.split()) for text in texts))


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    """Counts of a text's n-grams of lower-case words and single punctuation marks."""
    words = re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.lower())
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _expect_some(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("texts is empty; expected one text or more")
