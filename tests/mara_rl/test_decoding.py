"""Decoding against a serial decoder that runs the whole sequence for every candidate."""

import pytest
import torch

from mara_rl.agent import Agent, AgentSpec
from mara_rl.candidates import candidate_sets
from mara_rl.decoding import Decoder, bernoulli_kl
from mara_rl.errors import DataError
from mara_rl.policy_llm import PolicyLLM

PROMPTS = ["Hi", "How do I bake bread?", "What is the time in Lima?", "a", "Tell me a story."]
MAX_NEW_TOKENS = 9


def random_agent(llm: PolicyLLM, head: str, **spec: object) -> Agent:
    """An agent that accepts about half of what it sees, whatever its head."""
    agent = Agent(AgentSpec(hidden_size=llm.hidden_size, head=head, **spec))
    for weight in agent.network.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    with torch.no_grad():
        states = llm.model.base_model(torch.tensor([llm.prompt_ids(PROMPTS[2])])).last_hidden_state
        agent.network.output_linear.bias -= agent.network(states[0]).mean(0)
    return agent.eval()


@torch.inference_mode()
def serial_answer(llm: PolicyLLM, agent: Agent, prompt: str, rule: str, fallback: str) -> list[int]:
    """One candidate after the other, each by a forward over the whole sequence."""

    def state(tokens: list[int]) -> torch.Tensor:
        return llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]

    tokens, answer = llm.prompt_ids(prompt), []
    while len(answer) < MAX_NEW_TOKENS:
        prefix = state(tokens)
        sets = candidate_sets(
            llm.model.get_output_embeddings()(prefix)[None], agent.spec.top_k, agent.spec.top_p
        )
        n = int(sets.counts[0])
        accept = []
        for k in range(n):
            h = state([*tokens, int(sets.ids[0, k])])
            accept.append(torch.sigmoid(agent.accept_logit(h, sets.base_logits[0, k], prefix)))
        if rule == "argmax_induced":
            left, induced = 1.0, []
            for k, a in enumerate(accept):
                induced.append(left * (a if k < n - 1 else 1.0))
                left = left * (1 - a)
            chosen = int(torch.tensor(induced).argmax())
        else:
            over = [k for k, a in enumerate(accept[: n - 1]) if a > 0.5]
            last = n - 1 if accept[n - 1] > 0.5 or fallback == "last" else 0
            chosen = over[0] if over else last
        token = int(sets.ids[0, chosen])
        tokens, answer = [*tokens, token], [*answer, token]
        if token in llm.eos_ids:
            break
    return answer


@pytest.mark.parametrize("head", ["paper", "anchored", "relative"])
@pytest.mark.parametrize(
    ("rule", "fallback"),
    [("argmax_induced", "last"), ("threshold", "last"), ("threshold", "first")],
)
def test_rules_equal_the_serial_decoder(
    tiny_llm: PolicyLLM, head: str, rule: str, fallback: str
) -> None:
    agent = random_agent(tiny_llm, head, rule=rule, fallback=fallback, top_k=6, top_p=0.9)
    answers = Decoder(tiny_llm, num_slots=2, agent=agent).answers(
        PROMPTS, max_new_tokens=MAX_NEW_TOKENS
    )
    expected = [serial_answer(tiny_llm, agent, p, rule, fallback) for p in PROMPTS]
    assert [a.token_ids for a in answers] == expected
    assert any(a.candidates > len(a.token_ids) for a in answers), "nothing was ever rejected"


def test_an_untrained_anchored_agent_answers_as_the_base_llm(tiny_llm: PolicyLLM) -> None:
    base = Decoder(tiny_llm, 3).answers(PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    agent = Agent(AgentSpec(hidden_size=tiny_llm.hidden_size, head="anchored"))
    aligned = Decoder(tiny_llm, 3, agent=agent).answers(PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    assert [a.token_ids for a in aligned] == [b.token_ids for b in base]
    assert all(a.kl == pytest.approx(0, abs=1e-4) for a in aligned)


def test_base_greedy_equals_generate(tiny_llm: PolicyLLM) -> None:
    answers = Decoder(tiny_llm, 2).answers(PROMPTS, max_new_tokens=MAX_NEW_TOKENS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([tiny_llm.prompt_ids(prompt)])
        out = tiny_llm.model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        assert answer.token_ids == out[0, ids.shape[1] :].tolist()


def test_sampling_follows_the_truncated_distribution(tiny_llm: PolicyLLM) -> None:
    """First tokens by direct sampling and by accept/reject both follow p."""
    prompts = ["Hi"] * 600
    agent = Agent(AgentSpec(hidden_size=tiny_llm.hidden_size, head="anchored", top_k=5, top_p=0.9))
    decoders = [
        Decoder(tiny_llm, 50, rule="sample", top_k=5, top_p=0.9),
        Decoder(tiny_llm, 50, agent=agent, rule="sample"),
    ]
    ids = torch.tensor([tiny_llm.prompt_ids("Hi")])
    with torch.inference_mode():
        sets = candidate_sets(tiny_llm.model(ids).logits[:, -1], 5, 0.9)
    expected = dict(zip(sets.ids[0].tolist(), sets.probs[0].tolist(), strict=True))
    for decoder in decoders:
        answers = decoder.answers(prompts, max_new_tokens=1, seed=3)
        counts = {t: sum(a.token_ids == [t] for a in answers) for t in expected}
        assert sum(counts.values()) == len(prompts)
        for token, p in expected.items():
            sigma = (p * (1 - p) * len(prompts)) ** 0.5
            assert abs(counts[token] - p * len(prompts)) < 4 * sigma + 1e-9


def test_a_seed_fixes_the_sample(tiny_llm: PolicyLLM) -> None:
    decoder = Decoder(tiny_llm, 2, rule="sample")
    first = decoder.answers(PROMPTS, max_new_tokens=6, seed=1)
    assert first == decoder.answers(PROMPTS, max_new_tokens=6, seed=1)
    assert first != decoder.answers(PROMPTS, max_new_tokens=6, seed=2)


def test_openings_are_followed_as_far_as_the_candidates_allow(tiny_llm: PolicyLLM) -> None:
    decoder = Decoder(tiny_llm, 2, rule="sample", top_k=20, top_p=0.99)
    other = decoder.answers(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, seed=2)
    openings = [tiny_llm.tokenizer.decode(a.token_ids[:5]) for a in other]
    ids = [tiny_llm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in openings]
    openings[1] += 50 * "¤"  # never among the candidates
    openings[2], ids[2] = "", []
    free = decoder.answers(PROMPTS, max_new_tokens=MAX_NEW_TOKENS, seed=1)
    answers = decoder.answers(PROMPTS, openings=openings, max_new_tokens=MAX_NEW_TOKENS, seed=1)
    followed = [a.token_ids[: len(o)] == o for a, o in zip(answers, ids, strict=True)]
    assert all(followed)
    assert any(f.token_ids[: len(o)] != o for f, o in zip(free, ids, strict=True))
    assert all(len(a.token_ids) > len(o) for a, o in zip(answers, ids, strict=True))
    with pytest.raises(ValueError, match="openings"):
        Decoder(tiny_llm, 2).answers(PROMPTS, openings=openings, max_new_tokens=1)


def test_states_are_those_of_the_answer(tiny_llm: PolicyLLM) -> None:
    answer = Decoder(tiny_llm, 1, rule="sample", keep_states=True).answers(
        ["Hello"], max_new_tokens=5
    )[0]
    tokens = tiny_llm.prompt_ids("Hello") + answer.token_ids
    with torch.inference_mode():
        states = tiny_llm.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    expected = states[-len(answer.token_ids) - 1 :]
    torch.testing.assert_close(answer.states.float(), expected, rtol=2e-3, atol=2e-3)


def test_bad_prompts_and_agents_are_refused(tiny_llm: PolicyLLM) -> None:
    with pytest.raises(DataError, match="empty"):
        Decoder(tiny_llm, 1).answers([" "], max_new_tokens=4)
    with pytest.raises(DataError, match="exceeds the LLM's context of 256"):
        Decoder(tiny_llm, 1).answers(["x" * 300], max_new_tokens=4)
    agent = Agent(AgentSpec(hidden_size=64, head="paper"))
    with pytest.raises(DataError, match="hidden size 64"):
        Decoder(tiny_llm, 1, agent=agent)


def test_bernoulli_kl() -> None:
    a, r = torch.tensor([0.3, 0.9]), torch.tensor([0.5, 0.2])
    expected = a * (a / r).log() + (1 - a) * ((1 - a) / (1 - r)).log()
    torch.testing.assert_close(bernoulli_kl(a.logit(), r.logit()), expected)
