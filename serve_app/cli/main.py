"""`serve-app`: what Ray's own `serve` command does not tell.

Exit codes: 0 yes, 1 no, 2 the input is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app import __version__
from serve_app.cli.check import check
from serve_app.cli.node_resources import node_resources
from serve_app.errors import ServeAppError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "check":
            return check(options.config, options.address)
        return node_resources()
    except ServeAppError as error:
        print(f"serve-app: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve-app", description="Many models by name behind one address.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser(
        "check",
        help="is a Serve config file right, and could the cluster hold each of its models?",
        description="Reads a Serve config file and says for each model what it needs and whether a node has that. "
        "Starts nothing. Exits 0 if all is well, 1 if a model cannot be placed, 2 if the file is wrong.",
    )
    checking.add_argument("config", type=Path, help="a Ray Serve config file")
    checking.add_argument(
        "--address", help="the Ray cluster to ask; without it the one that runs here, else this machine"
    )
    commands.add_parser(
        "node-resources",
        help='prints this node\'s GPU memory for `ray start --num-gpus 0 --resources "$(serve-app node-resources)"`',
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
