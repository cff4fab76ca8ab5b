"""Checks the tools of a request to the Responses API that vLLM would drop without a word. It is pure.

vLLM shows the model only the tools that clients run, and leaves out all others. Without a parser of calls it answers
with the text of a call, where its endpoints for chat completions and messages refuse the request.
"""

from dataclasses import dataclass
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.wire.responses.tools import require_client_tool

# vLLM shows these to the model.
SHOWN = frozenset({"function", "custom", "namespace"})


@dataclass(frozen=True)
class ToolAbilities:
    """This is what an engine can do with tools. `reads_calls` says whether it finds calls in the text of its model, and
    `runs_hosted` whether it has a server that runs tools itself (`engine_args.tool_server`)."""

    reads_calls: bool = True
    runs_hosted: bool = False

    def check(self, tools: object, choice: object) -> None:
        """Raises InvalidRequest that names the field, for the decoded fields `tools` and `tool_choice`. vLLM judges
        what has a wrong type."""
        if not isinstance(tools, list) or not tools:
            return
        for index, tool in enumerate(tools):
            if isinstance(tool, dict) and not self.runs_hosted:
                require_client_tool(tool, f"tools[{index}]", SHOWN)
        if not self.reads_calls and choice != "none":
            raise _no_parser(choice)


def _no_parser(choice: Any) -> InvalidRequest:
    named = choice.get("name") if isinstance(choice, dict) else None
    kind = choice.get("type") if isinstance(choice, dict) else choice or "auto"
    wish = f"'{str(kind)[:64]}'" if named is None else f"of the function '{str(named)[:64]}'"
    return InvalidRequest(
        f"The tool choice {wish} needs a parser of calls, which this model is served without. Set engine_args: "
        "{enable_auto_tool_choice: true, tool_call_parser: …} in the config file, with the parser of the model, or "
        "send tool_choice: none.",
        param="tools",
    )
