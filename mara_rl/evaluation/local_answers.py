"""Answers by LLMs in this process: batched decoding, one LLM loaded at a time."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mara_rl.agents.agent import Agent
from mara_rl.common.display import Display
from mara_rl.common.errors import DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.evaluation.answer_maker import AnswerRequest
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.plan import AgentMethod, EvaluationPlan, GeneratedMethod, RewriteMethod
from mara_rl.llm.policy_llm import PolicyLLM, load_policy_llm, placement


class LocalAnswers:
    """The `AnswerMaker` of ``mara-rl evaluate``: a kill costs what was being decoded."""

    def __init__(self, plan: EvaluationPlan, display: Display) -> None:
        device, self.dtype = placement(None, plan.dtype)
        self.device = device.type
        self._plan = plan
        self._display = display
        self._decoder: Decoder | None = None

    def prepare(self, method: GeneratedMethod) -> None:
        """Load the method's LLM unless it is."""
        name, chat = self._plan.llm_of(method), getattr(method, "chat", True)
        if self._decoder is None or self._decoder.llm.name != name:
            self.release()
            with self._display.phase(f"loading {name}", total=1):
                llm = load_policy_llm(name, dtype=self._plan.dtype, chat=chat)
            self._decoder = Decoder(llm, self._plan.num_slots)

    def make(
        self,
        method: GeneratedMethod,
        agent: Agent | None,
        requests: Sequence[AnswerRequest],
        progress: Callable[[int], None],
    ) -> Iterator[list[Answer]]:
        """See `AnswerMaker`. What a step costs is shared by the answers that end next, so that the
        shares add up."""
        decoder, blend = self._decoder, None
        assert decoder is not None
        llm = decoder.llm
        if isinstance(method, AgentMethod) and agent is not None:
            agent.spec.check_llm(llm.name, llm.hidden_size, allow_other_llm=method.allow_other_llm)
            blend = Blend.of([agent.to(llm.device)], strength=method.strength)
        running: dict[int, tuple[AnswerRequest, DecodedAnswer]] = {}
        for request in requests:
            answer = decoder.submit(self._decode_request(method, llm, blend, request))
            running[id(answer)] = (request, answer)
        forwards, began_s = decoder.token_forwards, time.monotonic()
        while not decoder.idle:
            ended = dict.fromkeys(id(g.answer) for g in decoder.step() if g.answer.finish_reason)
            complete = [running.pop(key) for key in ended if key in running]
            if not complete:
                continue
            now_s, spent = time.monotonic(), decoder.token_forwards
            share = 1 / len(complete)
            yield [
                Answer.of(
                    request.id,
                    request.replicate,
                    answer,
                    forwards=(spent - forwards) * share,
                    seconds=(now_s - began_s) * share,
                )
                for request, answer in complete
                if answer.finish_reason != "failed"
            ]
            for request, answer in complete:
                if answer.finish_reason == "failed":
                    raise DataError(
                        f"prompt {request.id!r}: hidden states of the LLM are not finite; try "
                        "another dtype"
                    )
            forwards, began_s = spent, now_s
            progress(len(complete))

    def release(self) -> None:
        """Give the LLM's memory back before the next one or a score model is loaded."""
        self._decoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _decode_request(
        self, method: GeneratedMethod, llm: PolicyLLM, blend: Blend | None, request: AnswerRequest
    ) -> DecodeRequest:
        max_new_tokens = self._plan.max_new_tokens
        if isinstance(method, RewriteMethod):
            text = request.text
            ids = llm.prompt_ids(text) if method.chat else llm.tokenizer(text)["input_ids"]
            # A long answer to rewrite leaves less room for what becomes of it.
            max_new_tokens = min(max_new_tokens, max(llm.context_tokens - len(ids), 1))
        else:
            ids = llm.prompt_ids(request.text, self._plan.system)
        settings = DecodeSettings.parse(
            max_new_tokens=max_new_tokens, seed=request.seed, **_decode_options(method)
        )
        return DecodeRequest.of(llm, request.text, settings, prompt_ids=ids, blend=blend)


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
