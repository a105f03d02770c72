"""Answers to prompts: by the base LLM alone, or aligned by an agent, one candidate at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mara_rl.agent import Agent, Fallback, Rule
from mara_rl.candidate_walk import ACCEPT, CandidateWalk
from mara_rl.candidates import CandidateSets
from mara_rl.errors import DataError
from mara_rl.policy_llm import PolicyLLM
from mara_rl.slot_engine import SlotEngine

BaseRule = Literal["greedy", "sample"]


@dataclass
class DecodedAnswer:
    """One answer.

    Attributes:
        prompt: the prompt answered.
        text: the answer, special tokens left out.
        token_ids: its tokens, an end-of-turn token included.
        finish_reason: "stop" or "length".
        candidates: candidates looked at, forced ones included.
        kl: Σ KL(a_k ‖ r_k) over the decisions looked at, in nats; with rule ``sample`` an unbiased
            estimate of the answer's KL to the truncated base LLM. 0 without an agent.
        states: hidden states (T + 1, H) before each token and after the last, float16, CPU; only
            where asked for.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    candidates: int = 0
    kl: float = 0.0
    states: Tensor | None = None


class Decoder:
    """Decodes many prompts over S slots of one LLM; a slot that is done takes the next prompt.

    Without an agent: ``greedy`` or ``sample`` from the truncated base distribution. With one, its
    rule: ``argmax_induced`` takes the argmax of π(t_k) = a_k Π_{j<k}(1 − a_j) and stops looking as
    soon as the best π so far is at least the mass left; ``threshold`` takes the first candidate
    with a_k > 0.5, else the fallback; ``sample`` accepts candidate k with probability a_k.
    """

    def __init__(
        self,
        llm: PolicyLLM,
        num_slots: int,
        *,
        agent: Agent | None = None,
        rule: Rule | BaseRule | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        fallback: Fallback | None = None,
        system: str | None = None,
        keep_states: bool = False,
    ) -> None:
        """``rule``, ``top_k``, ``top_p`` and ``fallback`` default to the agent's own.

        Raises DataError when the agent was made for another hidden size than the LLM's.
        """
        if agent is not None and agent.spec.hidden_size != llm.hidden_size:
            raise DataError(
                f"agent: hidden size {agent.spec.hidden_size}; "
                f"LLM {llm.name!r} has hidden size {llm.hidden_size}"
            )
        self.llm = llm
        self.num_slots = num_slots
        self.agent = agent
        self.rule = rule or (agent.spec.rule if agent else "greedy")
        self.fallback = fallback or (agent.spec.fallback if agent else "last")
        self.system = system
        self.keep_states = keep_states
        self._generator = torch.Generator()
        self._openings: list[list[int]] = [[] for _ in range(num_slots)]
        sampled_base = agent is None and self.rule == "sample"
        self.walk = CandidateWalk(
            SlotEngine(llm, num_slots),
            top_k=top_k or (agent.spec.top_k if agent else 40),
            top_p=top_p or (agent.spec.top_p if agent else 0.95),
            first_index=self._sampled_index if sampled_base else None,
        )

    @property
    def token_forwards(self) -> int:
        """Tokens put through the LLM so far, idle slots included."""
        engine = self.walk.engine
        return engine.prefill_tokens + engine.candidate_tokens

    def answers(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        openings: Sequence[str] | None = None,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[DecodedAnswer]:
        """Answers to ``prompts``, in their order; ``progress`` is told of each one finished.

        ``openings``, one a prompt and for the base rule ``sample`` alone, are followed token by
        token for as long as the next one is among the candidates; then sampling goes on.

        Raises DataError naming the first prompt that is empty or does not fit the LLM's context.
        """
        if openings is not None and self.walk.first_index is None:
            raise ValueError("openings: only the base LLM's rule 'sample' can follow them")
        opening_ids = [
            self.llm.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in openings or [""] * len(prompts)
        ]
        self._generator.manual_seed(seed)
        todo = [(i, self._prompt_ids(p, max_new_tokens)) for i, p in enumerate(prompts)]
        todo.reverse()
        done = [DecodedAnswer(prompt) for prompt in prompts]
        running: dict[int, int] = {}  # slot -> prompt
        states: dict[int, list[Tensor]] = {}
        look = _Look(self.num_slots)
        moves = torch.zeros(self.num_slots, dtype=torch.long)
        while todo or running:
            for slot in range(self.num_slots):
                if slot not in running and todo:
                    running[slot], ids = todo.pop()
                    states[slot] = []
                    self._openings[slot] = opening_ids[running[slot]]
                    self.walk.start(slot, ids)
            self.walk.step(moves)
            moves = self._moves(look)
            active = self.walk.active.tolist()
            accepted = (moves == ACCEPT).tolist()
            pending = self.walk.pending_ids().tolist()
            looked, kl = self._looked_at(look)
            for slot, prompt in list(running.items()):
                if not active[slot]:
                    continue
                answer = done[prompt]
                answer.candidates += looked[slot]
                answer.kl += kl[slot]
                if not accepted[slot]:
                    continue
                if self.keep_states:
                    states[slot].append(_as_half(self.walk.h_prefix[slot]))
                answer.token_ids.append(pending[slot])
                stop = pending[slot] in self.llm.eos_ids
                if stop or len(answer.token_ids) >= max_new_tokens:
                    answer.finish_reason = "stop" if stop else "length"
                    answer.text = self.llm.text(answer.token_ids)
                    if self.keep_states:
                        states[slot].append(_as_half(self.walk.h[slot]))
                        answer.states = torch.stack(states[slot])
                    self.walk.stop([slot])
                    del running[slot]
                    if progress is not None:
                        progress(1)
        return done

    def _prompt_ids(self, prompt: str, max_new_tokens: int) -> list[int]:
        if not prompt.strip():
            raise DataError("prompt: empty; expected some text")
        ids = self.llm.prompt_ids(prompt, self.system)
        if len(ids) + max_new_tokens > self.llm.context_tokens:
            raise DataError(
                f"prompt of {len(ids)} tokens ({prompt[:40]!r}…): with max_new_tokens "
                f"{max_new_tokens} it exceeds the LLM's context of {self.llm.context_tokens}"
            )
        return ids

    def _sampled_index(self, sets: CandidateSets, slots: Sequence[int]) -> Tensor:
        """The next token of the slot's opening where there is one, else one sampled."""
        probs = sets.probs.cpu()
        sampled = torch.multinomial(probs, 1, generator=self._generator)[:, 0]
        wanted = torch.tensor([self._next_of_opening(slot) for slot in slots])
        there = (sets.ids.cpu() == wanted[:, None]) & (probs > 0)
        return torch.where(there.any(1), there.int().argmax(1), sampled)

    def _next_of_opening(self, slot: int) -> int:
        """-1 where there is none, or the answer has left it."""
        opening, begun = self._openings[slot], self.walk.tokens[slot]
        on_it = len(begun) < len(opening) and opening[: len(begun)] == begun
        return opening[len(begun)] if on_it else -1

    def _moves(self, look: "_Look") -> Tensor:
        """What each slot does about its pending candidate (S,)."""
        if self.agent is None:
            return torch.full((self.num_slots,), ACCEPT)
        walk = self.walk
        index = walk.index
        base_logit = walk.base_logits.gather(1, index[:, None])[:, 0]
        with torch.inference_mode():
            logit = self.agent.accept_logit(
                walk.h, base_logit.to(walk.h.device), walk.h_prefix
            ).cpu()
        forced = walk.forced
        accept_prob = torch.where(forced, 1.0, torch.sigmoid(logit))
        look.kl = torch.where(forced | look.settled, 0.0, bernoulli_kl(logit, base_logit))
        look.looked = ~look.settled
        induced = look.mass * accept_prob
        better = induced > look.best
        look.best = torch.where(better, induced, look.best)
        look.best_index = torch.where(better, index, look.best_index)
        look.mass = look.mass * (1 - accept_prob)
        if self.rule == "argmax_induced":
            decided = forced | (look.best >= look.mass)
            choice = look.best_index
        elif self.rule == "threshold":
            first_wins = forced & (self.fallback == "first") & (logit <= 0)
            decided = forced | (logit > 0)
            choice = torch.where(first_wins, 0, index)
        else:
            uniform = torch.rand(self.num_slots, generator=self._generator)
            decided = uniform < accept_prob
            choice = index
        # A choice that is not the pending candidate is looked at once more, then accepted.
        decided = decided | look.settled
        choice = torch.where(look.settled, index, choice)
        accept = decided & (choice == index)
        look.settled = decided & ~accept & walk.active
        look.reset(accept | ~walk.active)
        return torch.where(accept, ACCEPT, torch.where(decided, choice, index + 1))

    def _looked_at(self, look: "_Look") -> tuple[list[int], list[float]]:
        if self.agent is None:
            return [1] * self.num_slots, [0.0] * self.num_slots
        return look.looked.long().tolist(), look.kl.tolist()


def _as_half(h: Tensor) -> Tensor:
    """float16 on the CPU; bfloat16 reaches further, so large states are clipped."""
    limit = torch.finfo(torch.float16).max
    return h.float().clamp(-limit, limit).half().cpu()


class _Look:
    """How far each slot (S,) has looked into its current set of candidates."""

    def __init__(self, num_slots: int) -> None:
        self.mass = torch.ones(num_slots)
        self.best = torch.zeros(num_slots)
        self.best_index = torch.zeros(num_slots, dtype=torch.long)
        self.settled = torch.zeros(num_slots, dtype=torch.bool)
        self.looked = torch.zeros(num_slots, dtype=torch.bool)
        self.kl = torch.zeros(num_slots)

    def reset(self, slots: Tensor) -> None:
        self.mass[slots] = 1.0
        self.best[slots] = 0.0
        self.best_index[slots] = 0


def bernoulli_kl(logit_a: Tensor, logit_r: Tensor) -> Tensor:
    """KL(Bernoulli(σ(logit_a)) ‖ Bernoulli(σ(logit_r))) in nats, elementwise."""
    a = torch.sigmoid(logit_a)
    accept = torch.nn.functional.logsigmoid(logit_a) - torch.nn.functional.logsigmoid(logit_r)
    reject = torch.nn.functional.logsigmoid(-logit_a) - torch.nn.functional.logsigmoid(-logit_r)
    return a * accept + (1 - a) * reject
