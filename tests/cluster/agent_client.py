"""Has agents of other projects ask a server, with a tool that they run themselves.

    PYTHON tests/cluster/agent_client.py URL MODEL < QUESTIONS

PYTHON has pydantic-ai-slim[openai,anthropic] and openai-agents, which are not installed with this project. QUESTIONS is
JSON: a list of objects with `question`, `topic` and `answer`. Each agent asks each question. Prints, for each agent,
how many tool calls it made, and how many calls and answers were not the expected ones.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable

CALLS: list[str] = []


def look_up(topic: str) -> str:
    """Looks a topic up."""
    CALLS.append(topic)
    return f"Page of {topic}."


def pydantic_ai_agents(url: str, model: str) -> dict[str, Callable[[str], Awaitable[str]]]:
    """Agents of pydantic-ai over both APIs, whole and streamed."""
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    models = {
        "messages": AnthropicModel(model, provider=AnthropicProvider(api_key="none", base_url=url)),
        "responses": OpenAIResponsesModel(model, provider=OpenAIProvider(api_key="none", base_url=f"{url}/v1")),
    }
    made: dict[str, Callable[[str], Awaitable[str]]] = {}
    for name, of_model in models.items():
        agent = Agent(of_model, tools=[look_up], model_settings={"temperature": 0.0, "max_tokens": 200})

        async def ask(question: str, agent: Agent = agent) -> str:
            return str((await agent.run(question)).output)

        async def ask_streamed(question: str, agent: Agent = agent) -> str:
            async with agent.run_stream(question) as run:
                return str(await run.get_output())

        made[f"pydantic-ai, {name}"] = ask
        made[f"pydantic-ai, {name}, streamed"] = ask_streamed
    return made


def openai_agents(url: str, model: str) -> dict[str, Callable[[str], Awaitable[str]]]:
    """Agents of openai-agents over the Responses API, whole and streamed."""
    from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(api_key="none", base_url=f"{url}/v1")
    agent = Agent(
        name="tester",
        model=OpenAIResponsesModel(model=model, openai_client=client),
        tools=[function_tool(look_up)],
        model_settings=ModelSettings(temperature=0.0),
    )

    async def ask(question: str) -> str:
        return str((await Runner.run(agent, question)).final_output)

    async def ask_streamed(question: str) -> str:
        run = Runner.run_streamed(agent, question)
        async for _ in run.stream_events():
            pass
        return str(run.final_output)

    return {"openai-agents, responses": ask, "openai-agents, responses, streamed": ask_streamed}


async def main(url: str, model: str) -> int:
    """Prints a line of JSON for each agent. Returns 1 where something was not as expected."""
    questions = json.load(sys.stdin)
    wrong_in_all = 0
    for name, ask in {**pydantic_ai_agents(url, model), **openai_agents(url, model)}.items():
        CALLS.clear()
        answers, errors = [], []
        for entry in questions:
            try:
                answers.append(await ask(entry["question"]))
            except Exception as error:
                answers.append("")
                errors.append(f"{type(error).__name__}: {error}"[:300])
        wrong_answers = sum(answer != entry["answer"] for answer, entry in zip(answers, questions, strict=True))
        row = {"agent": name, "model": model, "tool_calls": len(CALLS), "wrong_answers": wrong_answers}
        wrong_calls = 0 if [entry["topic"] for entry in questions] == CALLS else 1
        print(json.dumps(row | {"calls_as_expected": not wrong_calls, "errors": errors[:2]}), flush=True)
        wrong_in_all += wrong_answers + wrong_calls
    return 1 if wrong_in_all else 0


if __name__ == "__main__":
    os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")
    sys.exit(asyncio.run(main(*sys.argv[1:3])))
