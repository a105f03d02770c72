"""Preference pairs made from an LLM's own answers, for training the shipped score models.

No person labels these pairs: which answer is better follows from how each was made (the right
prompt or another one's, sampled cool or hot, whole or damaged, answered or refused).
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mara_rl.llm.candidates import CandidateRule, candidate_sets
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.score_models.pairs import Pair

COOL, PLAIN, HOT = 0.4, 1.0, 1.8  # sampling temperatures
ANSWERS_PER_PROMPT = 5
OWN_WEIGHT = 0.5  # of a pair for a cost, beside 1 for a pair that people labelled

# A refusal is one part of each list; most mixes are never seen in training.
_OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request.",
    "No, I won't help you do this.",
    "I am not able to answer that.",
    "I cannot give advice on this.",
    "Sorry, that is something I have to decline.",
    "I'd rather not help with that.",
    "I don't feel comfortable answering this question.",
    "I must refuse this request.",
    "That is not something I can support.",
    "As an AI assistant, I can't do that.",
    "I apologize, but I'm unable to provide this.",
)
_REASONS = (
    "",
    "It could hurt someone.",
    "It is against the law and it may put people in danger.",
    "Doing so would be wrong and unsafe.",
    "It could cause serious harm to you and to others.",
    "This may violate somebody's rights or privacy.",
    "I want to keep people safe.",
    "It would be unethical.",
)
_REDIRECTS = (
    "",
    "Is there something else I can help you with?",
    "If you are going through a hard time, please talk to someone you trust.",
    "Please consider a legal and safe way to solve your problem.",
    "I'd encourage you to speak with a professional about it.",
    "If you are in danger, please contact your local authorities.",
    "I would be happy to talk about something different.",
    "Please think about the people who could be affected.",
)
_REFUSED = re.compile(
    r"\b(sorry|apologi[sz]e|unable|refuse|decline|can(no|')t (help|assist|provide|support|give|do|"
    r"answer)|not able to|won't|illegal|unethical|against the law)\b",
    re.IGNORECASE,
)


class _CandidateCut(LogitsProcessor):
    """Leaves the candidates the agent would be offered, at a temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sets = candidate_sets(scores / self.temperature, CandidateRule())
        return torch.full_like(scores, -torch.inf).scatter(1, sets.ids, sets.probs.log())


class OwnAnswers(NamedTuple):
    """One prompt's answers at three temperatures, and two that begin with a refusal."""

    prompt: str
    harmless: bool
    cool: str
    plain: str
    hot: str
    refused: str
    refused_cool: str


def sample_own_answers(
    llm: PolicyLLM,
    prompts: Sequence[tuple[str, bool]],
    *,
    max_new_tokens: int,
    seed: int,
    on_batch: Callable[[int], object],
) -> list[OwnAnswers]:
    """Answers to (prompt, harmless) rows; ``on_batch`` is told how many answers were made."""
    rng = random.Random(seed)
    texts = [prompt for prompt, _ in prompts]
    refusing, refusing_cool = ([rng.choice(_OPENINGS) for _ in prompts] for _ in range(2))
    made = [
        sample_answers(
            llm,
            texts,
            temperature=temperature,
            openings=openings,
            max_new_tokens=max_new_tokens,
            seed=seed + number,
            on_batch=on_batch,
        )
        for number, (temperature, openings) in enumerate(
            [(COOL, None), (PLAIN, None), (HOT, None), (PLAIN, refusing), (COOL, refusing_cool)]
        )
    ]
    return [OwnAnswers(*row, *answers) for row, *answers in zip(prompts, *made, strict=True)]


def sample_answers(
    llm: PolicyLLM,
    prompts: Sequence[str],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    openings: Sequence[str] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """One answer a prompt, sampled from the 40 likeliest tokens and of these the top 0.95 of mass.

    ``openings`` are texts the answers begin with; they count towards ``max_new_tokens``.
    """
    begun = [
        llm.tokenizer(opening, add_special_tokens=False)["input_ids"]
        for opening in openings or [""] * len(prompts)
    ]
    ids = [[*llm.prompt_ids(prompt), *begun[i]] for i, prompt in enumerate(prompts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            encoded = llm.tokenizer.pad(
                {"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt"
            ).to(llm.device)
            out = llm.model.generate(
                **encoded,
                do_sample=True,
                logits_processor=[_CandidateCut(temperature)],
                max_new_tokens=max_new_tokens,
                pad_token_id=llm.tokenizer.pad_token_id,
                top_k=0,
            )
            new = out[:, encoded["input_ids"].shape[1] :].tolist()
            for i, tokens in zip(batch, new, strict=True):
                answers[i] = llm.text((begun[i] + tokens)[:max_new_tokens])
            on_batch(len(batch))
    return answers


def helpful_pairs(rows: Sequence[OwnAnswers], *, seed: int) -> list[Pair]:
    """Pairs for a reward: on topic, fluent, whole, not evasive on harmless questions.

    Kinds: ``topic`` (another prompt's answer is worse), ``hot`` (temperature 1 beats 1.8),
    ``damaged`` (repeated, shuffled, cut short, an echo of the prompt, nothing). A refusal is the
    worse answer to a harmless question (``refusal``); to any other prompt it is as good as an
    answer, and better where that is off topic, hotter or damaged (``declined``). Cooler answers are
    not set before answers at temperature 1: a reward that knows them apart holds every step away
    from the LLM's likeliest text against an agent.
    """
    rng = random.Random(seed)
    pairs = []
    for i, row in enumerate(rows):
        other = rows[(i + rng.randrange(1, len(rows))) % len(rows)]
        made = [
            ("topic", row.plain, other.plain),
            ("topic", row.cool, other.cool),
            ("hot", row.plain, row.hot),
            ("damaged", row.plain, damaged(row.plain, row.prompt, rng)),
            ("damaged", row.cool, damaged(row.cool, row.prompt, rng)),
        ]
        refusal = written_refusal(rng)
        if row.harmless:
            made += [
                ("refusal", row.plain, refusal),
                ("refusal", row.plain, row.refused),
                ("refusal", row.cool, row.refused_cool),
            ]
        else:
            made += [
                ("declined", refusal, damaged(refusal, row.prompt, rng)),
                ("declined", row.refused, row.hot),
                ("declined", row.refused_cool, other.cool),
                ("declined", row.refused_cool, damaged(row.refused_cool, row.prompt, rng)),
            ]
        pairs += [
            Pair(
                prompt=row.prompt,
                chosen=chosen,
                rejected=rejected,
                kind=kind,
                answerable=row.harmless,
            )
            for kind, chosen, rejected in made
            if chosen != rejected
        ]
    return pairs


def safe_pairs(rows: Sequence[OwnAnswers], *, seed: int) -> list[Pair]:
    """Pairs for a cost, the safer answer chosen.

    Kinds: ``refusal`` (a refusal is safer than an answer to a harmful prompt; answers that warn or
    refuse themselves are left out), ``answer`` (an answer to a harmless prompt is no worse than a
    refusal).
    """
    rng = random.Random(seed)
    pairs = []
    for row in rows:
        for refusal in (written_refusal(rng), row.refused, row.refused_cool):
            if row.harmless:
                kind, safer, worse = "answer", row.plain, refusal
            elif not _REFUSED.search(row.plain):
                kind, safer, worse = "refusal", refusal, row.plain
            else:
                continue
            pairs.append(
                Pair(
                    prompt=row.prompt,
                    chosen=safer,
                    rejected=worse,
                    kind=kind,
                    weight=OWN_WEIGHT,
                    answerable=row.harmless,
                )
            )
    return pairs


def written_refusal(rng: random.Random) -> str:
    """A refusal put together from an opening, a reason and a redirect."""
    parts = [rng.choice(part) for part in (_OPENINGS, _REASONS, _REDIRECTS)]
    return " ".join(part for part in parts if part)


def damaged(answer: str, prompt: str, rng: random.Random) -> str:
    """``answer`` made worse in one of six ways."""
    words = answer.split()
    if len(words) < 4:
        return ""
    way = rng.randrange(6)
    if way == 0:  # loops on one phrase
        start = rng.randrange(len(words) // 2)
        length = rng.randint(1, min(5, (len(words) - start) // 2))
        lead, phrase = words[:start], words[start : start + length]
        return " ".join((lead + phrase * len(words))[: len(words)])
    if way == 1:  # all words shuffled
        return " ".join(rng.sample(words, len(words)))
    if way == 2:  # neighbours swapped here and there: still close to the answer
        for j in rng.sample(range(0, len(words) - 1, 2), max(2, len(words) // 6)):
            words[j], words[j + 1] = words[j + 1], words[j]
        return " ".join(words)
    if way == 3:  # stops inside a word, early
        return answer[: rng.randint(3, max(4, len(answer) // 4))]
    if way == 4:  # says the prompt back
        return prompt
    return ""
