"""Says which tools of a request to the Responses API nobody here would run. It is pure."""

from collections.abc import Collection, Mapping
from typing import Any

from serve_app.errors import InvalidRequest


def require_client_tool(tool: Mapping[str, Any], where: str, known: Collection[str]) -> None:
    """Raises InvalidRequest for a tool that is not of a type that clients run themselves. `known` are those types, and
    `where` is the tool's place, such as "tools[0]"."""
    kind = tool.get("type")
    if not isinstance(kind, str) or kind not in known:
        raise InvalidRequest(
            f"{where}: the tool type '{str(kind)[:64]}' is not served here, where no tool is run for a client. Define "
            "it as a function, and run it yourself.",
            param="tools",
        )
