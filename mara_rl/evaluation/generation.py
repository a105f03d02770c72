"""The answers of a plan's methods: which are to be made, in which order, and kept where."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mara_rl.agents.agent import Agent
from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, MaraError
from mara_rl.evaluation.answer_maker import AnswerMaker, AnswerRequest
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

Table = list[list[Answer]]  # by prompt (N), by replicate (R)
KL_ANSWERS = "kl"
"""Folder of the answers that a method samples to estimate its KL."""


class Generation:
    """Has the answers of a plan made, all those of one LLM before the next is needed."""

    def __init__(
        self,
        plan: EvaluationPlan,
        prompts: PromptSet,
        agents: Mapping[str, Agent],
        maker: AnswerMaker,
        folder: Path,
        display: Display,
    ) -> None:
        """``agents`` by method; ``folder`` holds ``<method>.jsonl`` files."""
        self._plan = plan
        self._prompts = prompts
        self._agents = agents
        self._maker = maker
        self._folder = folder
        self._display = display

    def run(self, given: Mapping[str, Table]) -> tuple[dict[str, Table], dict[str, list[Answer]]]:
        """The answers of every method but those that choose among others' (best_of).

        With them, by method, the answers that some sample to estimate their KL. ``given``: those
        made elsewhere. What the folder holds already is not made again. Raises DataError naming the
        method, ConfigError where the GPU's memory is too small.
        """
        plan, tables = self._plan, dict(given)
        kl_answers: dict[str, list[Answer]] = {}
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
            method = generated[name]
            tables[name] = self._answers(name, method, tables)
            if isinstance(method, AgentMethod) and method.kl_prompts:
                kl_answers[name] = self._kl_answers(name, method)
        self._maker.release()
        return tables, kl_answers

    def _answers(self, name: str, method: GeneratedMethod, tables: Mapping[str, Table]) -> Table:
        of = tables[method.of] if isinstance(method, RewriteMethod) else None
        replicates = len(of[0]) if of else getattr(method, "replicates", 1)
        wanted = []
        for row, prompt in enumerate(self._prompts.prompts):
            for number in range(replicates):
                text = prompt.text
                if isinstance(method, RewriteMethod) and of:
                    text = method.text(prompt.text, of[row][number].text)
                seed = answer_seed(self._plan.seed, name, prompt.prompt_id, number)
                wanted.append(AnswerRequest(prompt.prompt_id, number, text, seed))
        made = self._made(name, f"answers of {name}", method, f"{name}.jsonl", wanted)
        return [made[row : row + replicates] for row in range(0, len(made), replicates)]

    def _kl_answers(self, name: str, method: AgentMethod) -> list[Answer]:
        """Answers to prompts spread over all, sampled at temperature 1."""
        prompts = self._prompts.prompts
        count = min(method.kl_prompts, len(prompts))
        wanted = [
            AnswerRequest(
                prompts[row].prompt_id,
                0,
                prompts[row].text,
                answer_seed(self._plan.seed, f"{name}/{KL_ANSWERS}", prompts[row].prompt_id, 0),
            )
            for row in np.linspace(0, len(prompts) - 1, count).astype(int)
        ]
        (self._folder / KL_ANSWERS).mkdir(exist_ok=True)
        sampling = method.model_copy(update={"rule": "sample", "temperature": 1.0})
        file = f"{KL_ANSWERS}/{name}.jsonl"
        return self._made(name, f"answers of {name}, sampled for its KL", sampling, file, wanted)

    def _made(
        self,
        name: str,
        title: str,
        method: GeneratedMethod,
        file_name: str,
        wanted: Sequence[AnswerRequest],
    ) -> list[Answer]:
        """The answers wanted, in order; those that the file lacks are made and put there."""
        num_slots = self._plan.num_slots
        with AnswerFile(self._folder / file_name) as file:
            todo = [each for each in wanted if (each.id, each.replicate) not in file.done]
            if todo:
                done = len(wanted) - len(todo)
                try:
                    self._maker.prepare(method)
                    with self._display.phase(title, total=len(wanted), done=done) as phase:
                        agent = self._agents.get(name)
                        for answers in self._maker.make(method, agent, todo, phase.advance):
                            file.append(*answers)
                except MaraError as error:
                    raise type(error)(f"method {name!r}: {error}") from error
                except torch.OutOfMemoryError as error:
                    raise ConfigError(
                        f"method {name!r}: the GPU's memory is too small for num_slots: "
                        f"{num_slots}; lower it (--set num_slots={max(1, num_slots // 2)})"
                    ) from error
            return [file.done[each.id, each.replicate] for each in wanted]


def answer_seed(seed: int, method: str, prompt_id: str, replicate: int) -> int:
    """The seed of one answer, whatever else is decoded and in which order."""
    text = f"{seed}\n{method}\n{prompt_id}\n{replicate}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
