"""Making the answers: batched decoding that a kill interrupts at the cost of what was running."""

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mara_rl.agents.agent import Agent
from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, DataError, MaraError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.evaluation.answers import Answer, AnswerFile
from mara_rl.evaluation.plan import (
    AgentMethod,
    AnswersMethod,
    BestOfMethod,
    EvaluationPlan,
    GeneratedMethod,
    RewriteMethod,
)
from mara_rl.evaluation.prompt_set import PromptSet
from mara_rl.llm.policy_llm import PolicyLLM, load_policy_llm

Table = list[list[Answer]]  # by prompt (N), by replicate (R)


@dataclass(frozen=True)
class _Job:
    """One answer to be made: its prompt's id, its number, and what is asked."""

    id: str
    replicate: int
    request: DecodeRequest


class Generation:
    """Makes the answers of a plan's methods, all those of one LLM before the next is loaded."""

    def __init__(
        self,
        plan: EvaluationPlan,
        prompts: PromptSet,
        agents: Mapping[str, Agent],
        folder: Path,
        display: Display,
    ) -> None:
        """``agents`` by method; ``folder`` holds ``<method>.jsonl`` files."""
        self._plan = plan
        self._prompts = prompts
        self._agents = agents
        self._folder = folder
        self._display = display
        self._llm: PolicyLLM | None = None
        self._decoder: Decoder | None = None

    def run(self, given: Mapping[str, Table]) -> dict[str, Table]:
        """The answers of every method but those that choose among others' (best_of).

        ``given``: those made elsewhere. What the folder holds already is not made again. Raises
        DataError naming the method, ConfigError where the GPU's memory is too small.
        """
        plan, tables = self._plan, dict(given)
        generated = {
            name: method
            for name, method in plan.methods.items()
            if not isinstance(method, AnswersMethod | BestOfMethod)
        }
        # Rewriting needs the answers it rewrites; otherwise methods of one LLM stand together.
        order = sorted(
            generated,
            key=lambda name: (
                isinstance(generated[name], RewriteMethod),
                plan.llm_of(generated[name]) != plan.llm,
                plan.llm_of(generated[name]),
            ),
        )
        for name in order:
            tables[name] = self._answers(name, generated[name], tables)
        self._release()
        return tables

    def _answers(self, name: str, method: GeneratedMethod, tables: Mapping[str, Table]) -> Table:
        if isinstance(method, RewriteMethod):
            replicates = len(tables[method.of][0])
        else:
            replicates = method.replicates
        ids, num_slots = self._prompts.ids, self._plan.num_slots
        with AnswerFile(self._folder / f"{name}.jsonl") as file:
            wanted = [(row, number) for row in range(len(ids)) for number in range(replicates)]
            todo = [(row, number) for row, number in wanted if (ids[row], number) not in file.done]
            if todo:
                try:
                    llm = self._load(method)
                    jobs = self._jobs(name, method, llm, todo, tables)
                    self._decode(name, jobs, file, len(wanted))
                except MaraError as error:
                    raise type(error)(f"method {name!r}: {error}") from error
                except torch.OutOfMemoryError as error:
                    raise ConfigError(
                        f"method {name!r}: the GPU's memory is too small for num_slots: "
                        f"{num_slots}; lower it (--set num_slots={max(1, num_slots // 2)})"
                    ) from error
            return file.table(ids, replicates)

    def _load(self, method: GeneratedMethod) -> PolicyLLM:
        name, chat = self._plan.llm_of(method), getattr(method, "chat", True)
        if self._llm is None or self._llm.name != name:
            self._release()
            with self._display.phase(f"loading {name}", total=1):
                self._llm = load_policy_llm(name, dtype=self._plan.dtype, chat=chat)
            self._decoder = Decoder(self._llm, self._plan.num_slots)
        return self._llm

    def _release(self) -> None:
        """Give the LLM's memory back before the next one or a score model is loaded."""
        if self._llm is None:
            return
        self._llm = self._decoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _jobs(
        self,
        name: str,
        method: GeneratedMethod,
        llm: PolicyLLM,
        todo: Sequence[tuple[int, int]],
        tables: Mapping[str, Table],
    ) -> list[_Job]:
        blend = self._blend(name, method, llm) if isinstance(method, AgentMethod) else None
        jobs = []
        for row, number in todo:
            prompt = self._prompts.prompts[row]
            text, max_new_tokens = prompt.text, self._plan.max_new_tokens
            if isinstance(method, RewriteMethod):
                text = method.text(prompt.text, tables[method.of][row][number].text)
                ids = llm.prompt_ids(text) if method.chat else llm.tokenizer(text)["input_ids"]
                # A long answer to rewrite leaves less room for what becomes of it.
                room = llm.context_tokens - len(ids)
                max_new_tokens = min(max_new_tokens, max(room, 1))
            else:
                ids = llm.prompt_ids(text, self._plan.system)
            settings = DecodeSettings.parse(
                max_new_tokens=max_new_tokens,
                seed=answer_seed(self._plan.seed, name, prompt.prompt_id, number),
                **_decode_options(method),
            )
            request = DecodeRequest.of(llm, text, settings, prompt_ids=ids, blend=blend)
            jobs.append(_Job(prompt.prompt_id, number, request))
        return jobs

    def _blend(self, name: str, method: AgentMethod, llm: PolicyLLM) -> Blend:
        agent = self._agents[name]
        agent.spec.check_llm(llm.name, llm.hidden_size, allow_other_llm=method.allow_other_llm)
        return Blend.of([agent.to(llm.device)], strength=method.strength)

    def _decode(self, name: str, jobs: Sequence[_Job], file: AnswerFile, total: int) -> None:
        """Decode all jobs, each put on file as it is complete.

        What a step costs is shared by the answers that end next, so that the shares add up.
        """
        decoder = self._decoder
        assert decoder is not None
        running: dict[int, tuple[_Job, DecodedAnswer]] = {}
        for job in jobs:
            answer = decoder.submit(job.request)
            running[id(answer)] = (job, answer)
        forwards, began_s = decoder.token_forwards, time.monotonic()
        with self._display.phase(
            f"answers of {name}", total=total, done=total - len(jobs)
        ) as phase:
            while not decoder.idle:
                growths = decoder.step()
                ended = {id(g.answer): g.answer for g in growths if g.answer.finish_reason}
                complete = [running.pop(key) for key in ended if key in running]
                if not complete:
                    continue
                now_s, spent = time.monotonic(), decoder.token_forwards
                share = 1 / len(complete)
                failed = [job.id for job, a in complete if a.finish_reason == "failed"]
                for job, answer in complete:
                    if answer.finish_reason == "failed":
                        continue
                    file.append(
                        Answer(
                            id=job.id,
                            replicate=job.replicate,
                            text=answer.text,
                            finish_reason=answer.finish_reason,
                            tokens=len(answer.token_ids),
                            examined=answer.examined,
                            looked=answer.looked,
                            kl=answer.kl,
                            positions=tuple(np.bincount(answer.choices).tolist()),
                            forwards=(spent - forwards) * share,
                            seconds=(now_s - began_s) * share,
                        )
                    )
                if failed:
                    raise DataError(
                        f"prompt {failed[0]!r}: hidden states of the LLM are not finite; try "
                        "another dtype"
                    )
                forwards, began_s = spent, now_s
                phase.advance(len(complete))


def answer_seed(seed: int, method: str, prompt_id: str, replicate: int) -> int:
    """The seed of one answer, whatever else is decoded and in which order."""
    text = f"{seed}\n{method}\n{prompt_id}\n{replicate}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _decode_options(method: GeneratedMethod) -> dict[str, Any]:
    if isinstance(method, RewriteMethod):
        return {}
    if isinstance(method, AgentMethod):
        return {"rule": method.rule, "exact": method.exact, "temperature": method.temperature}
    return {
        "rule": "sample" if method.rule == "sample" else None,
        "temperature": method.temperature,
        "top_k": method.top_k,
        "top_p": method.top_p,
    }
