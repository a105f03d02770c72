"""``mara-rl generate``: one answer on the terminal, plain or aligned, as it is decoded."""

from typing import TYPE_CHECKING, Annotated

import typer

from mara_rl.cli.options import AgentsLLM, AllowOtherLLM, DTypeName
from mara_rl.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mara_rl.agents.agent import Agent
    from mara_rl.decoding.answer import DecodedAnswer
    from mara_rl.llm.policy_llm import PolicyLLM


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    agents: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            help="models:/name@alias, a folder, a .pth or a hub id; repeat to blend. "
            "Unless given: the champion for the LLM.",
        ),
    ] = None,
    weights: Annotated[
        list[float] | None, typer.Option("--weight", help="One per --agent; equal unless given.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The LLM alone, without an agent.")] = False,
    llm: AgentsLLM = None,
    strength: Annotated[
        float | None, typer.Option(help="Scales the agents: 0 the LLM alone, 1 as trained.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 256,
    rule: Annotated[
        str | None, typer.Option(help="argmax_induced, threshold or sample; the agent's own.")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Re-weight all candidates, π(t_k) ∝ p_k e^{term_k}; the agent's own.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="For rule sample.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For rule sample; 0.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends the answer. Repeatable.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates by top-k; the agent's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass by top-p; the agent's own.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    dtype: DTypeName = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Then show how each token was chosen.")
    ] = False,
    allow_other_llm: AllowOtherLLM = False,
    allow_other_candidates: Annotated[
        bool,
        typer.Option("--allow-other-candidates", help="Let --top-k, --top-p differ from its own."),
    ] = False,
) -> None:
    """Answer a prompt, streaming."""
    from mara_rl.decoding.blend import Blend
    from mara_rl.decoding.decoder import Decoder
    from mara_rl.decoding.request import DecodeRequest, DecodeSettings
    from mara_rl.llm.policy_llm import DTYPES, SMOLLM2, load_policy_llm

    if base and (agents or weights or strength is not None):
        raise typer.BadParameter(
            "--base answers without an agent: leave out --agent, --weight and --strength"
        )
    if weights and not agents:
        raise typer.BadParameter("--weight goes with --agent, one each")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    settings = DecodeSettings.parse(
        max_new_tokens=max_new_tokens,
        rule=rule,
        exact=exact,
        temperature=temperature,
        seed=seed or 0,
        stop=tuple(stop or ()),
        top_k=top_k,
        top_p=top_p,
        stream=True,
        trace=trace,
    )
    loaded = [] if base else _agents(agents, llm or SMOLLM2)
    llm_name = llm or next((agent.spec.llm for agent in loaded if agent.spec.llm), SMOLLM2)
    policy = load_policy_llm(llm_name, dtype=dtype)  # type: ignore[arg-type]
    for agent in loaded:
        agent.spec.check_llm(policy.name, policy.hidden_size, allow_other_llm=allow_other_llm)
        agent.to(policy.device)
    request = DecodeRequest.of(
        policy,
        prompt,
        settings,
        blend=Blend.of(loaded, weights, 1.0 if strength is None else strength) if loaded else None,
        system=system,
        allow_other_candidates=allow_other_candidates,
    )
    if request.rule != "sample" and seed is not None:
        raise ConfigError(f"--seed: rule {request.rule!r} draws nothing; expected --rule sample")
    decoder = Decoder(policy, num_slots=1)
    answer = decoder.submit(request)
    while not decoder.idle:
        for growth in decoder.step():
            print(growth.text, end="", flush=True)
    print()
    if answer.finish_reason == "failed":
        raise DataError(f"llm {policy.name!r}: its hidden states are not finite; try --dtype")
    if trace:
        _show(policy, answer)


def _agents(refs: list[str] | None, llm: str) -> list["Agent"]:
    from mara_rl.tracking.registry import model_name_for, resolve_agent

    if refs:
        return [resolve_agent(ref, allow_local=True) for ref in refs]
    champion = f"models:/{model_name_for(llm)}@champion"
    try:
        return [resolve_agent(champion, allow_local=True)]
    except DataError as error:
        raise ConfigError(
            f"no agent {champion}: train one (`mara-rl train quickstart`), name one with --agent, "
            "or see the LLM alone with --base"
        ) from error


def _show(llm: "PolicyLLM", answer: "DecodedAnswer") -> None:
    """A table of the tokens: green where the LLM's first candidate was taken, else yellow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "LLM p", "accept a", "induced π", "looked at", "instead of")
    for token_id, step in zip(answer.token_ids, answer.trace or [], strict=True):
        taken = step.candidates[step.choice]
        looked = sum(candidate.accept_prob is not None for candidate in step.candidates)
        passed = step.candidates[: step.choice]
        table.add_row(
            Text(repr(llm.text([token_id]))[1:-1], style="yellow" if step.choice else "green"),
            f"{taken.llm_prob:.3f}",
            _number(taken.accept_prob),
            _number(taken.induced_prob),
            f"{looked} of {len(step.candidates)}",
            Text(" ".join(repr(llm.text([c.token_id])) for c in passed[:6])),
        )
    console = Console()
    console.print(table)
    tokens = max(1, len(answer.token_ids))
    console.print(
        f"{len(answer.token_ids)} tokens ({answer.finish_reason}), "
        f"{answer.examined / tokens:.2f} candidates examined a token, KL {answer.kl / tokens:.3f}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
