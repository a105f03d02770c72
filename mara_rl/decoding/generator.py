"""`MARAGenerator`: an LLM and an agent in a few lines of Python, without any service."""

from pathlib import Path
from typing import Any, TypedDict

from mara_rl.agents.agent import Agent, Fallback
from mara_rl.agents.agent_refs import fetch_agent
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.llm.candidates import CandidateOverrides
from mara_rl.llm.policy_llm import DType, PolicyLLM, load_policy_llm

_MAX_NEW_TOKENS = 2048  # as the paper's evaluation has it


class Output(TypedDict):
    """What `MARAGenerator` returns: the answer's text, and all that is known of it."""

    answer: str
    details: DecodedAnswer


class MARAGenerator:
    """Answers of an LLM as it is (`get_raw_output`) and aligned by an agent (`get_proxy_output`).

    Attributes:
        llm: the LLM.
        agent: the agent, on the LLM's device.
    """

    def __init__(
        self,
        agent: str | Path | Agent,
        llm: str | PolicyLLM,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        fallback: Fallback | None = None,
        device: str | None = None,
        dtype: DType | None = None,
        strength: float = 1.0,
        system: str | None = None,
        allow_other_llm: bool = False,
        allow_other_candidates: bool = False,
    ) -> None:
        """
        Args:
            agent: an `Agent`, a folder or published ``.pth`` file, or ``owner/repository/file.pth``
                on the model hub.
            llm: a loaded LLM, or what `load_policy_llm` takes.
            top_k, top_p: candidates; None means the agent's own, another value needs
                ``allow_other_candidates``.
            fallback: what rule ``threshold`` takes when it accepts none; None: the agent's own.
            strength: scales the agent's part in the accept log-odds; 0 is the LLM alone.
            system: the system prompt; None keeps the chat template's own.
            allow_other_llm: use an agent that was trained on another LLM of the same size.

        Raises DataError for an agent that does not fit the LLM, ConfigError for settings that do
        not fit the agent or files that are not there.
        """
        self.llm = load_policy_llm(llm, device=device, dtype=dtype) if isinstance(llm, str) else llm
        self.agent = agent if isinstance(agent, Agent) else fetch_agent(str(agent))
        self.agent.spec.check_llm(
            self.llm.name, self.llm.hidden_size, allow_other_llm=allow_other_llm
        )
        self.agent.to(self.llm.device)
        self._blend = Blend.of([self.agent], strength=strength)
        self._candidates = {"top_k": top_k, "top_p": top_p}
        self._fallback = fallback
        self._system = system
        self._allow_other_candidates = allow_other_candidates
        self._decoder = Decoder(self.llm, num_slots=1)
        self._request("check", blend=self._blend, max_new_tokens=1)  # refuse bad settings now

    def get_raw_output(
        self,
        prompt: str,
        *,
        do_sample: bool = False,
        max_new_tokens: int | None = None,
        **more: Any,
    ) -> Output:
        """The LLM's own answer: greedy, or sampled from its truncated distribution.

        ``max_new_tokens`` is 2048, or what the context has room for, unless given.
        ``more`` are further fields of `DecodeSettings`, such as ``seed`` and ``temperature``.
        Raises ConfigError for those that would change nothing.
        """
        return self._answer(prompt, None, do_sample, max_new_tokens, more)

    def get_proxy_output(
        self,
        prompt: str,
        *,
        do_sample: bool = False,
        max_new_tokens: int | None = None,
        **more: Any,
    ) -> Output:
        """The aligned answer: by the agent's rule, or sampled from the induced distribution."""
        return self._answer(prompt, self._blend, do_sample, max_new_tokens, more)

    def _answer(
        self,
        prompt: str,
        blend: Blend | None,
        do_sample: bool,
        max_new_tokens: int | None,
        more: dict[str, Any],
    ) -> Output:
        if do_sample:
            more = {"rule": "sample", **more}
        if max_new_tokens is None:
            room = self.llm.context_tokens - len(self.llm.prompt_ids(prompt, self._system))
            max_new_tokens = max(1, min(_MAX_NEW_TOKENS, room))
        request = self._request(prompt, blend=blend, max_new_tokens=max_new_tokens, **more)
        answer = self._decoder.run([request])[0]
        return {"answer": answer.text, "details": answer}

    def _request(self, prompt: str, *, blend: Blend | None, **settings: Any) -> DecodeRequest:
        own: dict[str, Any] = dict(self._candidates)
        if blend is None:  # the same candidates as with the agent
            own = CandidateOverrides(**own).candidates_or(self.agent.spec).model_dump()
        elif self._fallback:
            own["fallback"] = self._fallback
        return DecodeRequest.of(
            self.llm,
            prompt,
            DecodeSettings.parse(**(own | settings)),
            blend=blend,
            system=self._system,
            allow_other_candidates=self._allow_other_candidates,
        )
