"""Decoding over the slots of one LLM: answers join and leave, each by the base LLM or aligned."""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import (
    CandidateTrace,
    DecodedAnswer,
    FinishReason,
    Growth,
    TokenTrace,
)
from mara_rl.decoding.blend import blended_terms
from mara_rl.decoding.request import DecodeRequest
from mara_rl.decoding.rules import (
    UNDECIDED,
    bernoulli_kl,
    decide,
    induced_probabilities,
    reweighted_logits,
    sampled_index,
)
from mara_rl.decoding.sequence import RunningSequence
from mara_rl.decoding.table import DecodeTable
from mara_rl.llm.candidates import CandidateRule, candidate_sets
from mara_rl.llm.policy_llm import PolicyLLM
from mara_rl.llm.prefill import PromptReader
from mara_rl.llm.slot_engine import SlotEngine


class Decoder:
    """Decodes requests over S slots of one LLM. They may join and leave while others run.

    Each `step` puts candidates of all running answers through the LLM in one forward, only as many
    as are likely to be needed; the rules of `mara_rl.decoding.rules` say when a choice is certain.
    While it is not, but one candidate leads, those that would follow it are looked at as well.
    An answer depends on its request alone, not on what runs beside it (up to rounding).
    """

    def __init__(
        self,
        llm: PolicyLLM,
        num_slots: int,
        *,
        prefill_chunk_tokens: int = 512,
        first_look_mass: float = 0.7,
        free_tokens: int | None = None,
    ) -> None:
        """
        Args:
            prefill_chunk_tokens: prompt tokens read per slot and step.
            first_look_mass: an answer first looks at candidates until their base probabilities
                reach this sum.
            free_tokens: tokens a forward takes at hardly more than the price of one: at least this
                many are looked at where there are as many candidates. Default: 64 on a GPU, else 6.
        """
        self.llm = llm
        self.num_slots = num_slots
        self.engine = SlotEngine(llm, num_slots)
        self._reader = PromptReader(self.engine, prefill_chunk_tokens)
        self._first_look_mass = first_look_mass
        self._free_tokens = free_tokens or (64 if llm.device.type == "cuda" else 6)
        self._waiting: deque[RunningSequence] = deque()
        self._running: dict[int, RunningSequence] = {}
        self._fresh: list[int] = []  # slots that took a token and need new candidates
        state = {"device": llm.device, "dtype": llm.model.dtype}
        self._table = DecodeTable(num_slots, llm.hidden_size, state)
        self._ahead = DecodeTable(num_slots, llm.hidden_size, state)  # after the leaders

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._running and not self._waiting

    @property
    def free_slots(self) -> int:
        """Slots that no request runs in or waits for."""
        return max(0, self.num_slots - len(self._running) - len(self._waiting))

    @property
    def token_forwards(self) -> int:
        """Tokens put through the LLM so far."""
        return self.engine.prefill_tokens + self.engine.candidate_tokens

    def submit(self, request: DecodeRequest) -> DecodedAnswer:
        """Queue a request; its answer grows while `step` is called."""
        running = RunningSequence(request, self.llm)
        self._waiting.append(running)
        return running.answer

    def cancel(self, answer: DecodedAnswer) -> None:
        """Stop decoding an answer; its slot is free for the next `step`. Nothing if it is done."""
        for running in self._waiting:
            if running.answer is answer:
                self._waiting.remove(running)
                running.end("cancelled")
                return
        for slot, running in self._running.items():
            if running.answer is answer:
                self._release(slot, "cancelled")
                return

    def run(
        self, requests: Sequence[DecodeRequest], progress: Callable[[int], None] | None = None
    ) -> list[DecodedAnswer]:
        """Answers to all requests, in order; ``progress`` is told of each one finished.

        Raises DataError when the LLM's hidden states are not finite.
        """
        answers = [self.submit(request) for request in requests]
        while not self.idle:
            for growth in self.step():
                if growth.answer.finish_reason == "failed":
                    raise DataError(
                        f"llm {self.llm.name!r} in {self.llm.model.dtype}: hidden states are not "
                        f"finite after prompt {growth.answer.prompt[:40]!r}…"
                    )
                if growth.answer.finish_reason and progress is not None:
                    progress(1)
        return answers

    @torch.inference_mode()
    def step(self) -> list[Growth]:
        """Read prompts, look once for every running answer; what was decided."""
        growths: list[Growth] = []
        self._admit()
        self._choose_unseen(self._open_sets(), growths)
        unread = set(self._reader.waiting)
        slots = sorted(slot for slot in self._running if slot not in unread)
        if slots:
            self._look(slots, growths)
            self._decide(slots, growths)
            self._decide(self._advance(slots), growths)
            self._advance(slots)
        return growths

    def _admit(self) -> None:
        """Give waiting requests the free slots."""
        free = (slot for slot in range(self.num_slots) if slot not in self._running)
        for slot in free:
            if not self._waiting:
                return
            running = self._waiting.popleft()
            self._running[slot] = running
            self._table.anchored[slot] = running.blend is None or running.blend.anchored
            self._reader.start(slot, running.request.prompt_ids)

    def _open_sets(self) -> list[int]:
        """Read prompts on; new candidates for slots that took a token or have read their prompt."""
        table = self._table
        complete, states = self._reader.read()
        if complete:
            blends = [self._running[slot].blend for slot in complete]
            ones = torch.ones(len(complete), dtype=torch.long)
            table.begin(complete, states, blended_terms(blends, ones, states))
        slots, self._fresh = self._fresh + complete, []
        leading = self._new_leaders()
        states = torch.cat([table.h_prefix[slots], table.h[leading, self._leaders(leading)]])
        if len(states):
            logits = self.engine.logits(states)
            self._open(table, slots, logits[: len(slots)])
            self._open(self._ahead, leading, logits[len(slots) :])
        for slot in slots:
            self._begin_token(slot)
        return slots

    def _open(self, table: DecodeTable, slots: Sequence[int], logits: Tensor) -> None:
        """Candidates from ``logits`` (R, V), each slot by its own rule."""
        groups: dict[CandidateRule, list[int]] = {}
        for row, slot in enumerate(slots):
            groups.setdefault(self._running[slot].request.candidates, []).append(row)
        for rule, rows in groups.items():
            own = logits if len(rows) == len(slots) else logits[rows]
            table.open([slots[row] for row in rows], candidate_sets(own, rule))

    def _begin_token(self, slot: int) -> None:
        running, table = self._running[slot], self._table
        running.choice, running.unseen = UNDECIDED, False
        table.uniform[slot] = running.draw()
        running.keep(table.h_prefix[slot])

    def _new_leaders(self) -> list[int]:
        """Slots with a candidate that leads and would not end the answer, new since last time."""
        slots = []
        for slot, running in self._running.items():
            if running.leader is None or running.leader == running.follows:
                continue
            running.follows = None
            token_id = int(self._table.sets.ids[slot, running.leader])
            room = running.request.settings.max_new_tokens - len(running.answer.token_ids)
            if room > 1 and token_id not in self.llm.eos_ids:
                running.follows = running.leader
                slots.append(slot)
        return slots

    def _leaders(self, slots: Sequence[int]) -> list[int]:
        return [self._running[slot].follows or 0 for slot in slots]

    def _choose_unseen(self, slots: Sequence[int], growths: list[Growth]) -> None:
        """Choose where no candidate needs to be looked at: by the base LLM, or from a set of one.

        Where that ends the answer it needs no further forward.
        """
        sets = self._table.sets
        counts, finite = sets.counts.tolist(), sets.probs[:, 0].isfinite().tolist()
        for slot in slots:
            running = self._running[slot]
            if not finite[slot]:
                growths.append(self._fail(slot))
            elif running.blend is None or counts[slot] == 1:
                choice = 0 if counts[slot] == 1 else self._base_choice(slot)
                growths.append(self._grow(slot, choice, examined=1, kl=0.0))
                running.unseen = True
                if running.ended and running.states is None:
                    self._release(slot, running.ended)

    def _base_choice(self, slot: int) -> int:
        """What the base LLM takes: the next token of the opening while it can, else by its rule."""
        table, running = self._table, self._running[slot]
        wanted = running.next_of_opening()
        if wanted is not None:
            count = int(table.sets.counts[slot])
            ids = table.sets.ids[slot, :count].tolist()
            if wanted in ids:
                return ids.index(wanted)
        if running.request.rule != "sample":
            return 0
        temperature = running.request.settings.temperature
        return int(sampled_index(table.sets.probs[slot], table.uniform[slot], temperature))

    def _look(self, slots: list[int], growths: list[Growth]) -> None:
        """Put candidates of all slots through the LLM in one forward: one chosen, or some more."""
        table, ahead, at = self._table, self._ahead, torch.tensor(slots)
        runs = [self._running[slot] for slot in slots]
        blends = [running.blend for running in runs]
        unseen = torch.tensor([running.unseen for running in runs])
        chosen = torch.tensor([running.choice for running in runs])
        follows = torch.tensor([-1 if run.follows is None else run.follows for run in runs])
        own = torch.where(unseen, 1, self._widths(table, at))
        once = (follows >= 0) & (ahead.looked[at] == 0)
        more = torch.where(once, self._widths(ahead, at), 0)
        counts = own + more
        row = torch.arange(len(slots)).repeat_interleave(counts)
        number = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        further = number >= own[row]
        first = torch.where(unseen, chosen, table.looked[at])
        column = torch.where(further, (ahead.looked[at] - own)[row] + number, first[row] + number)
        used = torch.tensor([running.used for running in runs])
        place = used[row] + number
        parents = table.place[at, follows.clamp_min(0)][row].where(further, -1)
        tokens = torch.zeros_like(row)
        for part, mine in ((table, ~further), (ahead, further)):
            tokens[mine] = part.sets.ids[at[row[mine]], column[mine]]
        h = self.engine.look(at, counts, tokens, used, parents if further.any() else None)
        terms = blended_terms(blends, counts, h)
        for part, mine in ((table, ~further), (ahead, further)):
            if mine.any():
                part.record(
                    at[row[mine]], column[mine], place[mine], h[mine.to(h.device)], terms[mine]
                )
        for running, amount in zip(runs, counts.tolist(), strict=True):
            running.answer.looked += amount
            running.used += amount
        if not terms.isfinite().all():
            for broken in row[~terms.isfinite().all(1)].unique().tolist():
                growths.append(self._fail(slots[broken]))

    def _widths(self, table: DecodeTable, at: Tensor) -> Tensor:
        """How many more candidates of a table each slot (R,) looks at now."""
        looked = table.looked[at]
        mass_before = 1.0 - table.sets.mass_left[at]
        wanted = (mass_before < self._first_look_mass).sum(1)
        settings = [self._running[slot].request for slot in at.tolist()]
        sampled = torch.tensor([request.rule == "sample" for request in settings])
        if sampled.any():
            likely = (mass_before <= table.uniform[at, None]).sum(1)
            wanted = torch.where(sampled, likely, wanted)
        exact = torch.tensor([request.exact for request in settings])
        left = table.sets.counts[at] - looked
        wanted = torch.where(looked > 0, looked, wanted).clamp_min(self._free_tokens // len(at))
        return torch.where(exact, left, torch.minimum(wanted.clamp_min(1), left))

    def _decide(self, slots: Sequence[int], growths: list[Growth]) -> None:
        """Apply the rule of each of these slots, where undecided, to what it has seen."""
        groups: dict[tuple[str, str], list[int]] = {}
        for slot in slots:
            running = self._running.get(slot)
            if running is not None and running.choice == UNDECIDED:
                request = running.request
                groups.setdefault((request.rule, request.fallback), []).append(slot)
        table = self._table
        for (rule, fallback), members in groups.items():
            at = torch.tensor(members)
            requests = [self._running[slot].request for slot in members]
            counts, looked = table.sets.counts[at], table.looked[at]
            logits = table.accept_logits(at)
            exact = torch.tensor([request.exact for request in requests])
            if exact.any():
                whole = reweighted_logits(table.sets.probs[at], table.terms[at, :, 0])
                logits = torch.where(exact[:, None], whole, logits)
            temperature = [request.settings.temperature for request in requests]
            choice, examined, leader = decide(
                rule,  # type: ignore[arg-type]
                logits,
                looked,
                counts,
                fallback=fallback,  # type: ignore[arg-type]
                uniform=table.uniform[at],
                temperature=None if set(temperature) == {1.0} else torch.tensor(temperature),
            )
            index = torch.arange(logits.shape[1])
            decisions = index < torch.minimum(examined, counts - 1)[:, None]
            kl = torch.where(decisions, bernoulli_kl(logits, table.sets.base_logits[at]), 0.0)
            found = zip(
                members, choice.tolist(), examined.tolist(), kl.sum(1).tolist(), strict=True
            )
            for place, (slot, taken, needed, nats) in enumerate(found):
                if taken == UNDECIDED:
                    if leader is not None and not exact[place]:
                        self._running[slot].leader = int(leader[place])
                    continue
                if self._running[slot].answer.trace is not None:
                    self._running[slot].seen = logits[place]
                growths.append(self._grow(slot, taken, examined=needed, kl=nats))

    def _advance(self, slots: Sequence[int]) -> list[int]:
        """Make the choices of these slots part of their sequences; end answers that are complete.

        Returns the slots that have looked ahead after what they took, and may decide again.
        """
        table = self._table
        grown = []
        for slot in slots:
            running = self._running.get(slot)
            if running is None or running.choice == UNDECIDED or slot in self._fresh:
                continue
            if not running.ended:
                grown.append(slot)
                continue
            running.keep(table.h[slot, running.choice])
            self._release(slot, running.ended)
        if not grown:
            return []
        at = torch.tensor(grown)
        choice = torch.tensor([self._running[slot].choice for slot in grown])
        self.engine.take(at, table.place[at, choice])
        table.take(at, choice)
        ahead = [
            slot for slot in grown if self._running[slot].follows == self._running[slot].choice
        ]
        if ahead:
            table.adopt(torch.tensor(ahead), self._ahead)
        for slot in grown:
            running = self._running[slot]
            running.leader = running.follows = None
            if slot in ahead:
                running.used -= 1  # the one taken
                self._begin_token(slot)
            else:
                running.used = 0
                self._fresh.append(slot)
        return ahead

    def _grow(self, slot: int, choice: int, *, examined: int, kl: float) -> Growth:
        """Take a candidate as the next token of a slot's answer."""
        running, table = self._running[slot], self._table
        answer = running.answer
        answer.examined += examined
        answer.kl += kl
        answer.choices.append(choice)
        if answer.trace is not None:
            answer.trace.append(self._trace(slot, choice))
        count = int(table.sets.counts[slot])
        if running.candidates is not None and count > 1:
            running.keep_candidates(table.sets.probs[slot, :count], table.h[slot, :count])
        running.choice = choice
        token_id = int(table.sets.ids[slot, choice])
        return Growth(answer, token_id, running.grow(token_id))

    def _trace(self, slot: int, choice: int) -> TokenTrace:
        table, running = self._table, self._running[slot]
        count, looked = int(table.sets.counts[slot]), int(table.looked[slot])
        ids = table.sets.ids[slot, :count].tolist()
        probs = table.sets.probs[slot, :count].tolist()
        accept: list[float | None] = [None] * count
        induced: list[float | None] = [None] * count
        if running.seen is not None:
            logits = running.seen[None, :count]
            index = torch.arange(count)
            last = (index == count - 1)[None]
            pi, _ = induced_probabilities(logits, (index < looked)[None], last)
            accept[:looked] = torch.sigmoid(logits[0, :looked]).tolist()
            if looked == count:
                accept[-1] = 1.0
            induced[:looked] = pi[0, :looked].tolist()
            running.seen = None
        rows = zip(ids, probs, accept, induced, strict=True)
        return TokenTrace([CandidateTrace(*row) for row in rows], choice)

    def _fail(self, slot: int) -> Growth:
        """End an answer whose hidden states are not finite."""
        answer = self._running[slot].answer
        self._release(slot, "failed")
        self.engine.scrub([slot])
        return Growth(answer, None, "")

    def _release(self, slot: int, reason: FinishReason) -> None:
        running = self._running.pop(slot)
        self._reader.drop([slot])
        self.engine.clear([slot])
        if slot in self._fresh:
            self._fresh.remove(slot)
        running.end(reason)
