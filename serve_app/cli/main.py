"""`serve-app` is the command for what Ray's own `serve` command does not do.

Exit codes: 0 means yes, 1 means no, 2 means that the input is wrong, 130 that Ctrl-C came before anything started, and
141 that the reader of a pipe has gone away.

A command's module is imported when that command runs, because Ray, torch and transformers cost seconds of CPU each, and
most commands need none of them.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app import __version__
from serve_app.cli.exit_codes import INTERRUPTED, READER_GONE
from serve_app.errors import ServeAppError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        try:
            return _answer(argv)
        finally:
            sys.stdout.flush()  # The interpreter would do so at its end, and print an error if the reader is gone.
    except BrokenPipeError:
        _silence()
        return READER_GONE


def _answer(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except ServeAppError as error:
        print(f"serve-app: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _silence() -> None:
    """Sends what is still in the buffers of the two streams to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())


def _run(options: argparse.Namespace) -> int:
    if options.command == "check":
        from serve_app.cli.check import check

        return check(options.config, options.address)
    if options.command == "plan":
        from serve_app.cli.plan.plan import plan

        return plan(options)
    if options.command == "diff":
        from serve_app.cli.diff import diff

        return diff(options.old, options.new, options.gpus, options.inventory, options.address)
    if options.command == "from-swift":
        from serve_app.cli.swift.from_swift import from_swift

        return from_swift(options.swift_command)
    if options.command == "from-llama-swap":
        from serve_app.cli.llama_swap.from_llama_swap import from_llama_swap

        return from_llama_swap(options.config)
    if options.command == "tune":
        from serve_app.cli.tune.tune import tune

        return tune(options)
    if options.command == "status":
        from serve_app.cli.status import status

        return status(options.address, options.json)
    if options.command == "doctor":
        from serve_app.cli.doctor import doctor

        return doctor()
    if options.command in ("run", "demo"):
        from serve_app.cli.start.run import RunOptions, demo, run

        chosen = RunOptions(options.address, options.log_file, options.verbose, options.app_dir, options.replace)
        if options.command == "run":
            return run(options.config, chosen)
        return demo(chosen, options.host, options.port)
    if options.command == "init":
        from serve_app.cli.init import Given, init

        gpus = "cpu" if options.device == "cpu" else options.gpus
        given = Given(options.model, options.name, options.infer_backend, gpus, options.max_model_len, options.port)
        return init(options.config, given, options.yes, options.force)
    if options.command == "node-env":
        from serve_app.cli.node_env import node_env

        return node_env(options.format)
    if options.command == "new-key":
        from serve_app.cli.new_key import new_key

        return new_key(options.name, options.role)
    from serve_app.cli.node_resources import node_resources

    return node_resources()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve-app", description="Serves many models by name behind one address.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    checking = commands.add_parser(
        "check",
        help="checks whether a Serve config file is right, and whether the cluster could hold each of its models",
        description="Reads a Serve config file and says for each model what it needs and whether a node has it. "
        "Starts nothing. Exits 0 if all is well, 1 if a model cannot be placed, 2 if the file is wrong.",
    )
    checking.add_argument("config", type=Path, help="a Ray Serve config file")
    checking.add_argument(
        "--address", help="the Ray cluster to ask; the default is the one that runs here, or else this machine"
    )
    _add_plan(commands)
    _add_diff(commands)
    _add_tune(commands)
    looking = commands.add_parser(
        "status",
        help="says what runs, what was planned and measured, and what is missing",
        description="Prints the models that Serve runs, with their replicas, load and last error; what each "
        "replica was planned and is measured to hold of each device; and what missing replicas wait for. Exits 0 if "
        "every model has its replicas, 1 if not, 2 if no Serve runs.",
    )
    looking.add_argument("--address", help="the Ray cluster to ask; the default is the one that runs here")
    looking.add_argument("--json", action="store_true", help="print data instead of a table")
    swift = commands.add_parser(
        "from-swift",
        help="prints a Serve config file made from a `swift deploy …` command line",
        description="Translates a `swift deploy …` command line of ms-swift 4 into a Serve config file. What does not "
        "carry over is listed in comments at its top, with the reason. Exits 2 if it is not such a command.",
    )
    swift.add_argument("swift_command", metavar="COMMAND", help="the whole command line, as one quoted word")
    swapping = commands.add_parser(
        "from-llama-swap",
        help="prints a Serve config file made from the config.yaml of llama-swap",
        description="Translates a config file of llama-swap into a Serve config file. Models that `vllm serve` runs "
        "become applications, of which those that llama-swap swaps share a pool. What does not carry over is listed in "
        "comments at its top, with the reason. Exits 2 if it is no such file, or if none of its models can be served.",
    )
    swapping.add_argument("config", type=Path, help="the config.yaml of llama-swap")
    commands.add_parser(
        "doctor",
        help="says what this machine has, and what would not work on it",
        description="Prints versions, memory, disk, GPUs and who uses them, and the Ray cluster that runs here, if "
        "any; then each problem with its cure. Starts nothing. Exits 0 if there is no problem, else 1.",
    )
    making = commands.add_parser(
        "new-key",
        help="makes an API key and prints its entry for the keys file",
        description="Prints a new API key to stderr, once, and its entry for the keys file to stdout. The entry holds "
        "the key's SHA-256 and not the key. Exits 2 if the file would not accept the name.",
    )
    making.add_argument("name", metavar="NAME", help="the name of the key's user, such as team-a; logs show it")
    making.add_argument(
        "--role", choices=["user", "admin"], default="user",
        help="what the key may do: use models, or change the cluster from the console too",
    )  # fmt: skip
    commands.add_parser(
        "node-resources",
        help='prints this node\'s GPU memory for `ray start --num-gpus 0 --resources "$(serve-app node-resources)"`',
    )
    return parser


def _add_tune(commands: Any) -> None:
    tuning = commands.add_parser(
        "tune",
        help="measures which settings of a model serve a workload best on this machine",
        description="Serves a model of the file again and again with a Ray of its own, each time with other settings, "
        "sends it a workload, and says which settings are best and how sure that is. Settings without room are cut by "
        "the plan, and what the file says stays unless --free names it. Ctrl-C keeps what was measured, and the same "
        "command goes on from there. Exits 0 if it has found settings, 1 if none can be used, 2 if the file or an "
        "option is wrong, 130 after Ctrl-C.",
    )
    tuning.add_argument("config", type=Path, help="a Ray Serve config file, which is not changed")
    tuning.add_argument("--model", action="append", help="the model to tune; several are tuned together (repeatable)")
    tuning.add_argument("--objective", choices=("throughput", "latency", "balanced"), default="throughput")
    tuning.add_argument("--ttft-p95", metavar="TIME", help="95 of 100 first tokens come within it, such as 500ms")
    tuning.add_argument("--tpot-p95", metavar="TIME", help="95 of 100 requests have a token in each such time")
    tuning.add_argument(
        "--workload", default="chat", help="chat, rag, code, or a log FILE.jsonl of requests; the default is chat"
    )
    tuning.add_argument("--clients", type=_counts, metavar="N,N", help="numbers of clients at once, such as 1,8,32")
    tuning.add_argument("--rate", type=_rates, metavar="R,R", help="requests per second that come at random moments")
    tuning.add_argument("--budget", default="30m", metavar="TIME", help="how long it may take; the default is 30m")
    tuning.add_argument("--max-starts", type=int, default=12, help="how often it may start the model")
    tuning.add_argument("--measure", default="10s", metavar="TIME", help="how long each load is measured")
    tuning.add_argument("--free", action="append", metavar="FIELD", help="a field that may change (repeatable)")
    tuning.add_argument("--write", type=Path, metavar="FILE", help="write the file with the best settings there")
    tuning.add_argument("--report", type=Path, metavar="FILE", help="write a report there, one page of HTML")
    tuning.add_argument("--journal", type=Path, metavar="FILE", help="where the measurements are kept")
    tuning.add_argument("--restart", action="store_true", help="forget what an earlier run has measured")


def _counts(text: str) -> tuple[int, ...]:
    """Returns whole numbers that commas separate."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between them") from None


def _rates(text: str) -> tuple[float, ...]:
    """Returns numbers that commas separate."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from None


def _add_run(commands: Any) -> None:
    running = commands.add_parser(
        "run",
        help="serves a config file until Ctrl-C, as `serve run` does, with Serve's settings set",
        description="Starts Ray, or joins the cluster that runs here, and serves the file's models until Ctrl-C or "
        "SIGTERM. It sets what Serve needs in its environment (see node-env), checks the file first, and shows how the "
        "models come up. Exits 0 if it was stopped, 1 if it failed or if no model of the file can be served, 2 if the "
        "file is wrong.",
    )
    running.add_argument("config", type=Path, help="a Ray Serve config file")
    running.add_argument("--address", help='HOST:PORT of a Ray cluster to join, or "local" for a Ray of its own')
    running.add_argument("--app-dir", default=".", help="the folder in which the file's other import paths are found")
    running.add_argument(
        "--replace", action="store_true", help="end the applications that a running Serve has but the file does not"
    )
    showing = commands.add_parser(
        "demo",
        help="serves two small models that come with this package, on the CPU",
        description="Serves the demo model with both engines, in a Ray of its own, until Ctrl-C. It needs no GPU and "
        "no network.",
    )
    showing.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in and needs SERVE_APP_API_KEYS")
    showing.add_argument("--port", type=_port, default=8000)
    showing.set_defaults(address="local", app_dir=".", replace=False)
    for command in (running, showing):
        command.add_argument("--log-file", type=Path, help="where the output of Ray and the engines goes")
        command.add_argument("--verbose", action="store_true", help="show that output here and keep no log")
    _add_init(commands)
    printing = commands.add_parser(
        "node-env",
        help='prints what Serve needs in its environment: eval "$(serve-app node-env)" before `ray start`',
        description="Prints the environment that `serve-app run` sets, for the nodes of a cluster that `ray start` "
        "starts. Files for `serve deploy` then need no controller_options.",
    )
    printing.add_argument(
        "--format", choices=["shell", "env", "json"], default="shell",
        help="lines with export, lines for `docker run --env-file` and systemd, or JSON",
    )  # fmt: skip


def _add_init(commands: Any) -> None:
    making = commands.add_parser(
        "init",
        help="writes a config file for a model after the plan has accepted it",
        description="Asks up to five questions, plans the model, offers a fix if it does not fit, and "
        "writes the file. Each flag answers a question. Exits 0 if the file was written, 1 if the model does not "
        "fit, 2 if the input is wrong.",
    )
    making.add_argument("config", type=Path, nargs="?", default=Path("models.yaml"), metavar="FILE")
    making.add_argument("--model", help="a Hugging Face id, the path of a folder, or serve-app/demo")
    making.add_argument("--name", help="the model's name for clients")
    making.add_argument("--infer-backend", choices=["pt", "vllm", "auto"])
    where = making.add_mutually_exclusive_group()
    where.add_argument("--gpus", help='plan for these GPUs, such as "8GiB,24GiB", or "here" for those of this machine')
    where.add_argument("--device", choices=["cpu"], help="run on the CPU")
    making.add_argument("--max-model-len", type=int, help="tokens of prompt and answer together")
    making.add_argument("--port", type=_port, default=8000)
    making.add_argument("--yes", action="store_true", help="ask nothing, and take the defaults and the first fix")
    making.add_argument("--force", action="store_true", help="replace a file that exists already")


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port. Write a number from 1 to 65535.")
    return int(text)


def _at_once(text: str) -> tuple[int, int]:
    requests, _, tokens = text.lower().partition("x")
    try:
        found = int(requests), int(tokens)
    except ValueError:
        found = 0, 0
    if not all(0 < number <= 10**9 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests and tokens. Write such as 32x8192.")
    return found


def _add_plan(commands: Any) -> None:
    planning = commands.add_parser(
        "plan",
        help="says what each model will take of each GPU, and whether it fits",
        description="Plans the memory of a Serve config file, or of one model, before anything starts. It needs no GPU "
        "and loads no weights. Exits 0 if all fits, 1 if not, 2 if the input is wrong.",
    )
    planning.add_argument("config", type=Path, nargs="?", help="a Ray Serve config file")
    _add_inventory(planning)
    planning.add_argument(
        "--beside-running", action="store_true",
        help="count what the cluster's other models take or were planned to take; those of the file replace theirs",
    )  # fmt: skip
    planning.add_argument(
        "--write", type=Path, metavar="OUT", help="write the file with what the plan chose, and keep its comments"
    )
    planning.add_argument("--svg", type=Path, metavar="FILE", help="also draw the plan, as an SVG picture")
    planning.add_argument("--json", action="store_true", help="print data instead of bars and a table")
    planning.add_argument(
        "--for", dest="at_once", type=_at_once, metavar="NxTOKENS",
        help="plan for so many requests of so many tokens at once, such as 32x8192, for each replica",
    )  # fmt: skip
    planning.add_argument(
        "--what",
        choices=["fits"],
        help="print a table of the ways to run each model alone: backend, GPUs, the longest "
        "request, and how many of those run at once",
    )
    planning.add_argument(
        "--explain", metavar="NAME", help="print every term of a model's plan with its formula and its source"
    )
    planning.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="print the plan beside that of another file, and exit 0 if that one fits and 1 if not",
    )
    one = planning.add_argument_group("models without a file")
    one.add_argument("--model", action="append", help="a local folder or a Hugging Face id; may be given several times")
    one.add_argument("--infer-backend", choices=["pt", "vllm", "auto"], default="auto")
    one.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    one.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    one.add_argument("--tensor-parallel-size", type=int)
    one.add_argument("--pipeline-parallel-size", type=int)
    one.add_argument("--nnodes", type=int, help="the number of nodes over which vLLM's stages go")
    one.add_argument("--max-model-len", type=int)
    one.add_argument("--max-num-seqs", type=int)
    one.add_argument("--max-memory", help="a bound for each device, such as '{0: 3GB, 1: 10GB}'")
    one.add_argument("--num-gpus", type=float)
    one.add_argument(
        "--quantization", help="bnb-nf4, bnb-int8 or auto with pt, and a method of vLLM's such as fp8 with vllm"
    )
    one.add_argument("--kv-cache-dtype", help="fp8 or int8 with pt, and a type of vLLM's such as fp8 with vllm")


def _add_diff(commands: Any) -> None:
    comparing = commands.add_parser(
        "diff",
        help="says what `serve deploy` of a changed file would start, stop and restart, and whether the result fits",
        description="Compares two Serve config files as Serve would, and plans the second. Changes nothing. Exits 0 if "
        "the second fits, 1 if not, 2 if a file is wrong.",
    )
    comparing.add_argument("old", type=Path, help="the file that runs now")
    comparing.add_argument("new", type=Path, help="the file that is to run")
    _add_inventory(comparing)


def _add_inventory(command: Any) -> None:
    command.add_argument(
        "--gpus", help='plan for GPUs such as "8GiB,24GiB" or "2xA100-80GB,RTX3090"; ";" separates nodes'
    )
    command.add_argument("--inventory", type=Path, help="plan for the nodes of this YAML file")
    command.add_argument(
        "--address", help="plan for this Ray cluster; the default is the one that runs here, or else this machine"
    )


if __name__ == "__main__":
    sys.exit(main())
