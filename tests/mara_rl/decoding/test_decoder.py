"""Decoding against a serial decoder that runs the whole sequence for every candidate."""

import math

import numpy as np
import pytest
import torch
from small_agents import random_agent

from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.common.errors import ConfigError, DataError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.decoding.rules import induced_probabilities, sampled_index
from mara_rl.llm.candidates import CandidateRule, candidate_sets
from mara_rl.llm.policy_llm import PolicyLLM

PROMPTS = ["Hi", "How do I bake bread?", "What is the time in Lima?", "a", "Tell me a story."]
MAX_NEW_TOKENS = 9
HEADS = ["paper", "anchored", "relative", "advantage"]


def decode(
    llm: PolicyLLM,
    prompts: list[str],
    *,
    agents: tuple[Agent, ...] = (),
    weights: tuple[float, ...] | None = None,
    slots: int = 2,
    seeds: list[int] | None = None,
    openings: list[str] | None = None,
    **settings: object,
) -> list[DecodedAnswer]:
    """Answers to ``prompts`` by a new decoder."""
    blend = Blend.of(agents, weights) if agents else None
    settings.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    requests = [
        DecodeRequest.of(
            llm,
            prompt,
            DecodeSettings(seed=seeds[i] if seeds else i, **settings),
            blend=blend,
            opening=openings[i] if openings else "",
        )
        for i, prompt in enumerate(prompts)
    ]
    return Decoder(llm, slots).run(requests)


class Serial:
    """One sequence at a time, each candidate by a forward over all of it."""

    def __init__(self, llm: PolicyLLM, blend: Blend, **options: object) -> None:
        self.llm, self.blend, self.options = llm, blend, options

    def state(self, tokens: list[int]) -> torch.Tensor:
        return self.llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]

    def accept_logit(self, h: torch.Tensor, base: torch.Tensor, prefix: torch.Tensor) -> float:
        total = base if self.blend.anchored else torch.zeros(())
        for agent, weight in zip(self.blend.agents, self.blend.weights, strict=True):
            own = agent.accept_logit(h, base, prefix)
            total = total + weight * (own - base if self.blend.anchored else own)
        return float(total)

    @torch.inference_mode()
    def answer(self, prompt: str, seed: int = 0) -> list[int]:
        rng = np.random.default_rng(seed)
        spec = self.blend.agents[0].spec
        tokens, answer = self.llm.prompt_ids(prompt), []
        while len(answer) < MAX_NEW_TOKENS:
            prefix = self.state(tokens)
            logits = self.llm.model(torch.tensor([tokens])).logits[:, -1]
            sets = candidate_sets(logits, spec)
            n = int(sets.counts[0])
            accept = [
                self.accept_logit(
                    self.state([*tokens, int(sets.ids[0, k])]), sets.base_logits[0, k], prefix
                )
                for k in range(n)
            ]
            token = int(sets.ids[0, self.choose(accept, sets.probs[0, :n], prefix, rng)])
            tokens, answer = [*tokens, token], [*answer, token]
            if token in self.llm.eos_ids:
                break
        return answer

    def choose(
        self,
        accept: list[float],
        probs: torch.Tensor,
        prefix: torch.Tensor,
        rng: np.random.Generator,
    ) -> int:
        rule, n = self.options["rule"], len(accept)
        if rule == "threshold":
            over = [k for k in range(n) if accept[k] > 0]
            return over[0] if over else (0 if self.options["fallback"] == "first" else n - 1)
        if self.options.get("exact"):
            base = [math.log(p) for p in probs.tolist()]
            terms = [
                accept[k] - float(torch.logit((probs[k] / probs[k:].sum()).double()))
                for k in range(n - 1)
            ]
            # The last candidate's base log-odds are not finite; its term comes from the state.
            terms.append(accept[n - 1] - 30.0)
            weights = torch.tensor([b + t for b, t in zip(base, terms, strict=True)]).double()
            induced = torch.softmax(weights, 0)
        else:
            index = torch.arange(n)
            induced = induced_probabilities(
                torch.tensor(accept)[None], (index >= 0)[None], (index == n - 1)[None]
            )[0][0]
        if rule == "argmax_induced":
            return int(induced.argmax())
        temperature = float(self.options.get("temperature", 1.0))
        return int(sampled_index(induced, rng.random(), temperature))


RULES: list[dict[str, object]] = [
    {"rule": "argmax_induced"},
    {"rule": "threshold", "fallback": "last"},
    {"rule": "threshold", "fallback": "first"},
    {"rule": "sample"},
    {"rule": "sample", "temperature": 0.6},
]
EXACT: list[dict[str, object]] = [
    {"rule": "argmax_induced", "exact": True},
    {"rule": "sample", "exact": True},
]


@pytest.mark.parametrize(
    ("head", "options"),
    [(head, options) for head in HEADS for options in RULES]
    + [(head, options) for head in HEADS[1:] for options in EXACT],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_rules_equal_the_serial_decoder(
    tiny_llm: PolicyLLM, head: str, options: dict[str, object]
) -> None:
    agent = random_agent(tiny_llm, head, top_k=6, top_p=0.9)
    answers = decode(tiny_llm, PROMPTS, agents=(agent,), **options)
    serial = Serial(tiny_llm, Blend.of([agent]), **options)
    expected = [serial.answer(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    assert [a.token_ids for a in answers] == expected
    assert any(a.looked > len(a.token_ids) for a in answers), "never looked at several"
    assert any(a.examined > len(a.token_ids) for a in answers), "nothing was ever rejected"


@pytest.mark.parametrize("options", RULES[:4], ids=lambda options: "-".join(options.values()))
def test_rules_equal_the_serial_decoder_in_every_family(
    any_llm: PolicyLLM, options: dict[str, object]
) -> None:
    agent = random_agent(any_llm, "advantage", top_k=6, top_p=0.9)
    answers = decode(any_llm, PROMPTS[:2], agents=(agent,), **options)
    serial = Serial(any_llm, Blend.of([agent]), **options)
    assert [a.token_ids for a in answers] == [
        serial.answer(p, i) for i, p in enumerate(PROMPTS[:2])
    ]


def test_what_follows_a_leader_is_looked_at_in_the_same_forward(
    tiny_llm: PolicyLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = random_agent(tiny_llm, "relative", top_k=12, top_p=0.99)
    settings = DecodeSettings(max_new_tokens=24, rule="argmax_induced", keep_states=True)
    requests = [DecodeRequest.of(tiny_llm, p, settings, blend=Blend.of([agent])) for p in PROMPTS]
    decoder = Decoder(tiny_llm, 2, first_look_mass=0.1, free_tokens=1)
    answers = [decoder.submit(request) for request in requests]
    grown_at_once = set()
    while not decoder.idle:
        grown = [id(growth.answer) for growth in decoder.step()]
        grown_at_once |= {grown.count(answer) for answer in grown}
    assert grown_at_once >= {1, 2}
    monkeypatch.setattr(Decoder, "_new_leaders", lambda self: [])
    plain = Decoder(tiny_llm, 2, first_look_mass=0.1, free_tokens=1)
    expected = plain.run(requests)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert [a.examined for a in answers] == [a.examined for a in expected]
    assert decoder.engine.forwards < plain.engine.forwards
    for answer, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.states, other.states, rtol=2e-3, atol=2e-3)
        assert len(answer.states) == len(answer.token_ids) + 1


def test_a_blend_adds_the_terms_of_its_agents(any_llm: PolicyLLM) -> None:
    agents = tuple(random_agent(any_llm, head, top_k=6) for head in HEADS[1:])
    weights = (0.7, 1.9, 0.6)
    blend = Blend.of(agents, weights)
    answers = decode(any_llm, PROMPTS, agents=agents, weights=weights, rule="sample")
    serial = Serial(any_llm, blend, rule="sample")
    assert [a.token_ids for a in answers] == [serial.answer(p, i) for i, p in enumerate(PROMPTS)]


def test_a_blend_of_one_is_the_agent_and_strength_0_the_base_llm(tiny_llm: PolicyLLM) -> None:
    agent = random_agent(tiny_llm, "relative", top_k=6, top_p=0.9)
    other = random_agent(tiny_llm, "anchored", top_k=6, top_p=0.9)
    alone = decode(tiny_llm, PROMPTS, agents=(agent,), rule="sample")
    blended = decode(tiny_llm, PROMPTS, agents=(agent, other), weights=(1.0, 0.0), rule="sample")
    assert [a.token_ids for a in blended] == [a.token_ids for a in alone]
    base = decode(tiny_llm, PROMPTS, rule="sample", top_k=6, top_p=0.9)
    nothing = decode(tiny_llm, PROMPTS, agents=(agent,), weights=(0.0,), rule="sample")
    assert [a.token_ids for a in nothing] == [b.token_ids for b in base]
    assert [a.token_ids for a in alone] != [b.token_ids for b in base]
    assert all(a.kl == pytest.approx(0, abs=1e-4) for a in nothing)


def test_answers_do_not_depend_on_what_runs_beside_them(tiny_llm: PolicyLLM) -> None:
    agents = [random_agent(tiny_llm, head, top_k=5 + i) for i, head in enumerate(HEADS)]
    kinds = [(agents[0], "threshold"), (agents[1], "sample"), (agents[2], "argmax_induced")]
    requests = [
        DecodeRequest.of(
            tiny_llm,
            prompt,
            DecodeSettings(max_new_tokens=MAX_NEW_TOKENS, rule=rule, seed=3),
            blend=Blend.of([agent]),
        )
        for prompt in PROMPTS
        for agent, rule in kinds
    ] + [
        DecodeRequest.of(tiny_llm, p, DecodeSettings(max_new_tokens=4, rule="sample"))
        for p in PROMPTS
    ]
    alone = [Decoder(tiny_llm, 1).run([request])[0].token_ids for request in requests]
    together = Decoder(tiny_llm, 4)
    answers = []
    for request in requests:  # they join while others run
        answers.append(together.submit(request))
        together.step()
    while not together.idle:
        together.step()
    assert [answer.token_ids for answer in answers] == alone


def test_a_cancelled_answer_leaves_its_slot(tiny_llm: PolicyLLM) -> None:
    agent = random_agent(tiny_llm, "relative", top_k=6)
    decoder = Decoder(tiny_llm, 1)
    requests = [
        DecodeRequest.of(tiny_llm, p, DecodeSettings(max_new_tokens=200), blend=Blend.of([agent]))
        for p in PROMPTS[:3]
    ]
    first, second, third = map(decoder.submit, requests)
    assert decoder.free_slots == 0
    while len(first.token_ids) < 3:
        decoder.step()
    decoder.cancel(first)
    decoder.cancel(second)
    decoder.cancel(first)
    assert (first.finish_reason, second.finish_reason) == ("cancelled", "cancelled")
    assert first.text == tiny_llm.text(first.token_ids)
    for _ in range(40):
        decoder.step()
    assert third.token_ids[:20] == Decoder(tiny_llm, 1).run([requests[2]])[0].token_ids[:20]


def test_an_untrained_anchored_agent_answers_as_the_base_llm(tiny_llm: PolicyLLM) -> None:
    base = decode(tiny_llm, PROMPTS)
    agent = Agent(AgentSpec(hidden_size=tiny_llm.hidden_size, head="anchored"))
    aligned = decode(tiny_llm, PROMPTS, agents=(agent,))
    assert [a.token_ids for a in aligned] == [b.token_ids for b in base]


def test_base_greedy_equals_generate(any_llm: PolicyLLM) -> None:
    answers = decode(any_llm, PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([any_llm.prompt_ids(prompt)])
        out = any_llm.model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        assert answer.token_ids == out[0, ids.shape[1] :].tolist()
        assert answer.looked < len(answer.token_ids), "the last token needs no forward"


@pytest.mark.parametrize("with_agent", [False, True])
def test_sampling_follows_the_truncated_distribution(tiny_llm: PolicyLLM, with_agent: bool) -> None:
    """First tokens by direct sampling and by accept/reject both follow p, seed by seed."""
    agent = Agent(AgentSpec(hidden_size=tiny_llm.hidden_size, head="anchored", top_k=5, top_p=0.9))
    ids = torch.tensor([tiny_llm.prompt_ids("Hi")])
    with torch.inference_mode():
        sets = candidate_sets(tiny_llm.model(ids).logits[:, -1], CandidateRule(top_k=5, top_p=0.9))
    expected = dict(zip(sets.ids[0].tolist(), sets.probs[0].tolist(), strict=True))
    answers = decode(
        tiny_llm,
        ["Hi"] * 600,
        slots=50,
        agents=(agent,) if with_agent else (),
        rule="sample",
        max_new_tokens=1,
        top_k=5,
        top_p=0.9,
    )
    counts = {t: sum(a.token_ids == [t] for a in answers) for t in expected}
    assert sum(counts.values()) == len(answers)
    for token, p in expected.items():
        sigma = (p * (1 - p) * len(answers)) ** 0.5
        assert abs(counts[token] - p * len(answers)) < 4 * sigma + 1e-9


def test_a_seed_fixes_the_sample(tiny_llm: PolicyLLM) -> None:
    first = decode(tiny_llm, PROMPTS, rule="sample")
    assert first == decode(tiny_llm, PROMPTS, rule="sample", slots=3)
    other = decode(tiny_llm, PROMPTS, rule="sample", seeds=[9] * len(PROMPTS))
    assert [a.token_ids for a in first] != [a.token_ids for a in other]


def test_openings_are_followed_as_far_as_the_candidates_allow(tiny_llm: PolicyLLM) -> None:
    options = {"rule": "sample", "top_k": 20, "top_p": 0.99}
    other = decode(tiny_llm, PROMPTS, seeds=[50, 51, 52, 53, 54], **options)
    openings = [tiny_llm.tokenizer.decode(a.token_ids[:5]) for a in other]
    ids = [tiny_llm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in openings]
    openings[1] += 50 * "¤"  # never among the candidates
    openings[2], ids[2] = "", []
    free = decode(tiny_llm, PROMPTS, **options)
    answers = decode(tiny_llm, PROMPTS, openings=openings, **options)
    assert all(a.token_ids[: len(o)] == o for a, o in zip(answers, ids, strict=True))
    assert any(f.token_ids[: len(o)] != o for f, o in zip(free, ids, strict=True))
    assert all(len(a.token_ids) > len(o) for a, o in zip(answers, ids, strict=True))


@pytest.mark.parametrize("with_agent", [False, True])
def test_states_are_those_of_the_answer(tiny_llm: PolicyLLM, with_agent: bool) -> None:
    agent = random_agent(tiny_llm, "relative")
    answer = decode(
        tiny_llm,
        ["Hello"],
        agents=(agent,) if with_agent else (),
        rule="sample",
        keep_states=True,
        max_new_tokens=5,
    )[0]
    tokens = tiny_llm.prompt_ids("Hello") + answer.token_ids
    with torch.inference_mode():
        states = tiny_llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    expected = states[-len(answer.token_ids) - 1 :]
    torch.testing.assert_close(answer.states.float(), expected, rtol=2e-3, atol=2e-3)


def test_candidates_are_kept_where_there_was_a_choice(tiny_llm: PolicyLLM) -> None:
    agent = random_agent(tiny_llm, "advantage", top_k=6)
    options = {"rule": "sample", "exact": True, "keep_candidates": True, "trace": True}
    answers = decode(tiny_llm, PROMPTS, agents=(agent,), keep_states=True, **options)
    forced = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        known, trace = answer.candidates, answer.trace
        chosen = [i for i, token in enumerate(trace) if len(token.candidates) > 1]
        forced += len(trace) - len(chosen)
        assert known.positions.tolist() == chosen
        assert known.counts.tolist() == [len(trace[i].candidates) for i in chosen]
        listed = [c for i in chosen for c in trace[i].candidates]
        assert known.probs.tolist() == pytest.approx([c.llm_prob for c in listed])
        begun = tiny_llm.prompt_ids(prompt)
        rows = zip(chosen, known.states.split(known.counts.tolist()), strict=True)
        for position, states in rows:
            before = begun + answer.token_ids[:position]
            with torch.inference_mode():
                expected = [
                    tiny_llm.model.base_model(
                        torch.tensor([[*before, c.token_id]])
                    ).last_hidden_state[0, -1]
                    for c in trace[position].candidates
                ]
            torch.testing.assert_close(states.float(), torch.stack(expected), rtol=2e-3, atol=2e-3)
    with pytest.raises(ConfigError, match="keep_candidates: needs `exact`"):
        decode(tiny_llm, ["Hi"], agents=(agent,), keep_candidates=True)


def test_text_streams_and_stops(tiny_llm: PolicyLLM) -> None:
    prompt, settings = PROMPTS[1], {"max_new_tokens": 30, "rule": "sample", "seed": 4}
    agent = random_agent(tiny_llm, "anchored", top_k=20)
    blend = Blend.of([agent])

    def stream(**more: object) -> tuple[str, DecodedAnswer]:
        decoder = Decoder(tiny_llm, 1)
        request = DecodeRequest.of(
            tiny_llm, prompt, DecodeSettings(stream=True, **settings, **more), blend=blend
        )
        answer = decoder.submit(request)
        pieces = []
        while not decoder.idle:
            pieces += [growth.text for growth in decoder.step()]
        return "".join(pieces), answer

    text, whole = stream()
    assert text == whole.text == tiny_llm.text(whole.token_ids)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut, stopped = stream(stop=("never there", stop))
    assert cut == stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_a_trace_says_why_each_token_was_taken(tiny_llm: PolicyLLM) -> None:
    agent = random_agent(tiny_llm, "relative", top_k=6, top_p=0.95)
    answer = decode(tiny_llm, PROMPTS[:1], agents=(agent,), rule="argmax_induced", trace=True)[0]
    assert len(answer.trace) == len(answer.token_ids)
    assert answer.choices == [step.choice for step in answer.trace]
    for token_id, step in zip(answer.token_ids, answer.trace, strict=True):
        seen = [c for c in step.candidates if c.induced_prob is not None]
        assert step.candidates[step.choice].token_id == token_id
        assert sum(c.llm_prob for c in step.candidates) == pytest.approx(1)
        if seen:
            assert max(c.induced_prob for c in seen) == step.candidates[step.choice].induced_prob
            mass = 1.0
            for candidate in seen:
                assert candidate.induced_prob == pytest.approx(mass * candidate.accept_prob)
                mass -= candidate.induced_prob
    base = decode(tiny_llm, PROMPTS[:1], trace=True)[0]
    assert all(c.accept_prob is None for step in base.trace for c in step.candidates)


def test_states_that_are_not_finite_end_one_answer_alone(tiny_llm: PolicyLLM) -> None:
    agent = random_agent(tiny_llm, "anchored", top_k=6)
    decoder = Decoder(tiny_llm, 2)
    requests = [
        DecodeRequest.of(tiny_llm, p, DecodeSettings(max_new_tokens=20), blend=Blend.of([agent]))
        for p in PROMPTS[:3]
    ]
    good = Decoder(tiny_llm, 1).run(requests[1:])
    bad, *answers = map(decoder.submit, requests)
    decoder.step()
    with torch.inference_mode():
        decoder.engine._cache.layers[0].keys[0, :, 0] = float("nan")
    while not decoder.idle:
        decoder.step()
    assert bad.finish_reason == "failed"
    assert [a.token_ids for a in answers] == [a.token_ids for a in good]
    again = decoder.run(requests[:1])  # the slot is clean
    assert again[0].token_ids == Decoder(tiny_llm, 1).run(requests[:1])[0].token_ids
    tiny_llm.model.base_model.norm.weight.data *= float("nan")
    with pytest.raises(DataError, match="hidden states are not finite"):
        decoder.run(requests[:1])
