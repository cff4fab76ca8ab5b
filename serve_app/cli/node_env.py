"""`serve-app node-env` prints what Serve needs in the environment in which Ray starts."""

import json
import shlex

from serve_app.deploy.serve_env import haproxy_command, serve_environment


def node_env(form: str) -> int:
    """Prints the variables in the form "shell", "env" or "json". Returns 0.

    Raises ConfigError if `serve-app-haproxy` is not installed.
    """
    print(formatted(serve_environment(str(haproxy_command())), form))
    return 0


def formatted(variables: dict[str, str], form: str) -> str:
    """Returns the variables as lines for a shell, as lines of NAME=VALUE, or as a JSON object."""
    if form == "json":
        return json.dumps(variables, indent=1)
    if form == "env":  # Neither docker nor systemd expects quotes here.
        return "\n".join(f"{name}={value}" for name, value in variables.items())
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
