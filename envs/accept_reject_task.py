"""The accept/reject task over S slots: the one implementation behind both environments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from envs.candidate_walk import ACCEPT, CandidateWalk
from envs.observation import FORCED, encode_state
from envs.protocols import Prompt, PromptSource, Scorer
from envs.reward import RewardSpec
from envs.task_settings import TaskSettings
from mara_rl.common.errors import DataError, RetryableError
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.llm.slot_engine import SlotEngine

MAX_FAILURES = 3
"""Reasons that a task keeps until they are taken."""


@dataclass
class Answer:
    """A finished (or failed) episode of one slot.

    ``finish_reason`` is "stop", "length" or "failed"; then ``failure`` says why, and ``outage``
    that a service was away, for which the prompt is not to blame. ``decisions`` and
    ``forced_steps`` count candidates looked at with and without a choice.
    """

    prompt: Prompt
    finish_reason: str
    response: str = ""
    num_tokens: int = 0
    decisions: int = 0
    forced_steps: int = 0
    prefill_tokens: int = 0
    failure: str = ""
    outage: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0

    def info(self) -> dict[str, Any]:
        """The terminal step's info."""
        return {
            "prompt": self.prompt.text,
            "prompt_id": self.prompt.prompt_id,
            "entry_id": self.prompt.entry_id,
            "response": self.response,
            "finish_reason": self.finish_reason,
            "failure": self.failure,
            "num_tokens": self.num_tokens,
            "decisions": self.decisions,
            "forced_steps": self.forced_steps,
            "prefill_tokens": self.prefill_tokens,
            **{f"score_{name}": value for name, value in self.scores.items()},
        }


class AcceptRejectTask:
    """S slots that answer prompts, one candidate a step; see the package's environments.

    Attributes:
        last_failure: why the last failed episode failed, "" before any has.
    """

    def __init__(
        self,
        llm: PolicyLLM,
        num_slots: int,
        settings: TaskSettings,
        *,
        prompts: PromptSource,
        scorer: Scorer,
        reward: RewardSpec,
    ) -> None:
        self.llm = llm
        self.num_slots = num_slots
        self.settings = settings
        self.prompts = prompts
        self.scorer = scorer
        self.reward = reward
        self.walk = CandidateWalk(
            SlotEngine(llm, num_slots),
            settings.candidates,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
        )
        self.last_failure = ""
        self._num_failed = 0  # not yet taken
        self._failures: set[str] = set()
        self._open: dict[int, Answer] = {}

    def restart(self, generator: np.random.Generator) -> None:
        """Abandon every open episode; their prompts are handed out again."""
        self.walk.stop(range(self.num_slots))
        self._open.clear()
        self.prompts.restart(generator)

    def step(self, actions: np.ndarray, begin: np.ndarray) -> dict[int, Answer]:
        """One step of every slot; the answers that ended in it, by slot, scored unless deferred.

        ``actions`` (S,): 0 reject, 1 accept, ignored where forced and where ``begin`` (S,), bool,
        gives the slot a new prompt instead.
        """
        walk, begin_t = self.walk, torch.as_tensor(begin)
        accept = torch.as_tensor(actions == 1) | walk.forced
        acting = walk.active & ~begin_t
        for slot in acting.nonzero()[:, 0].tolist():
            answer = self._open[slot]
            if walk.forced[slot]:
                answer.forced_steps += 1
            else:
                answer.decisions += 1
        ended = self._end(acting & accept)
        for slot in np.flatnonzero(begin).tolist():
            self._begin(slot)
        walk.step(torch.where(accept, ACCEPT, walk.index + 1))
        broken = walk.active & ~walk.h.isfinite().all(-1).cpu()
        for slot in broken.nonzero()[:, 0].tolist():
            ended[slot] = self._finish(slot, "failed")
            walk.engine.scrub([slot])
            self._fail(ended[slot], "the LLM's hidden state is not finite")
        if not self.settings.defer_scores:
            self.score([a for a in ended.values() if a.finish_reason != "failed"])
        return ended

    def observations(self) -> dict[str, np.ndarray]:
        """Fresh observation arrays of all slots; idle slots and unread prompts: zeros, forced."""
        walk, dtype = self.walk, self.settings.state_dtype
        index = walk.index[:, None]
        used = torch.tensor([len(tokens) for tokens in walk.tokens])
        x = torch.stack(
            [
                walk.sets.base_logits.gather(1, index)[:, 0],
                walk.sets.probs.gather(1, index)[:, 0].clamp_min(1e-38).log(),
                walk.index.float(),
                walk.sets.mass_left.gather(1, index)[:, 0],
                (self.settings.max_new_tokens - used).float(),
                walk.forced.float(),
            ],
            dim=-1,
        )
        idle = ~walk.active
        x[idle] = 0.0
        x[idle, FORCED] = 1.0
        observations = {"h": encode_state(walk.h, dtype), "x": x.numpy()}
        observations["h"][idle.numpy()] = 0
        if self.settings.prefix:
            observations["h_prefix"] = encode_state(walk.h_prefix, dtype)
            observations["h_prefix"][idle.numpy()] = 0
        return observations

    def candidate_ids(self) -> np.ndarray:
        """Token id of each slot's pending candidate (S,), int64; −1 where there is none."""
        return torch.where(self.walk.active, self.walk.pending_ids(), -1).numpy()

    def score(self, answers: Sequence[Answer]) -> None:
        """Score answers in one call and set their rewards; those without a finite score fail.

        Where a score model refuses the call, it is made again in halves: only the answers that it
        refuses on their own fail.
        """
        if not answers:
            return
        try:
            scores = self.scorer.score([(a.prompt.text, a.response) for a in answers])
        except RetryableError as error:
            for answer in answers:
                answer.outage = True
                self._fail(answer, str(error))
            return
        except DataError as error:
            if len(answers) == 1:
                self._fail(answers[0], str(error))
                return
            half = len(answers) // 2
            self.score(answers[:half])
            self.score(answers[half:])
            return
        rewards = self.reward(self.scorer.names, scores)
        for answer, row, reward in zip(answers, scores, rewards, strict=True):
            answer.scores = dict(zip(self.scorer.names, row.tolist(), strict=True))
            answer.reward = float(reward)
            if not np.isfinite(reward):
                answer.reward = 0.0
                self._fail(answer, f"score not finite: {answer.scores}")

    def take_failures(self) -> tuple[int, frozenset[str]]:
        """How many episodes failed since the last call, and the first few reasons."""
        taken = self._num_failed, frozenset(self._failures)
        self._num_failed, self._failures = 0, set()
        return taken

    def _begin(self, slot: int) -> None:
        while True:
            prompt = self.prompts.next()
            ids = []
            if prompt.text.strip():
                ids = self.llm.prompt_ids(prompt.text, self.settings.system)
            room = self.llm.context_tokens - self.settings.max_new_tokens
            if ids and len(ids) <= room:
                break
            reason = (
                f"prompt {prompt.prompt_id!r} has {len(ids)} tokens; the LLM's context leaves "
                f"room for {room}"
                if ids
                else f"prompt {prompt.prompt_id!r} is empty"
            )
            self.prompts.reject(prompt, reason)
        self.walk.start(slot, ids)
        self._open[slot] = Answer(prompt, "", prefill_tokens=len(ids))

    def _end(self, accepted: torch.Tensor) -> dict[int, Answer]:
        """Close the slots whose accepted token is an end of turn or the last allowed one."""
        ended = {}
        pending = self.walk.pending_ids().tolist()
        for slot in accepted.nonzero()[:, 0].tolist():
            tokens = self.walk.tokens[slot]
            stop = pending[slot] in self.llm.eos_ids
            if stop or len(tokens) + 1 >= self.settings.max_new_tokens:
                tokens.append(pending[slot])
                ended[slot] = self._finish(slot, "stop" if stop else "length")
        return ended

    def _fail(self, answer: Answer, failure: str) -> None:
        answer.finish_reason, answer.failure = "failed", failure
        self.last_failure = failure
        self._num_failed += 1
        if len(self._failures) < MAX_FAILURES:
            self._failures.add(failure)

    def _finish(self, slot: int, reason: str) -> Answer:
        answer = self._open.pop(slot)
        tokens = self.walk.tokens[slot]
        answer.finish_reason = reason
        answer.num_tokens = len(tokens)
        answer.response = self.llm.text(tokens)
        self.walk.stop([slot])
        return answer
