"""Twenty tool calls by each agent of other projects, against both engines, by name and unchanged.

    python -m tests.cluster.agent_calls --python PYTHON [--folder FOLDER] [--engines pt vllm]

PYTHON is that of an environment with pydantic-ai-slim[openai,anthropic] and openai-agents. The model is that of
`tool_model.py`, which is trained into FOLDER unless it is there. Prints a line of JSON for each agent and engine. Exits
with 1 where a tool call or an answer is not the expected one.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.conftest import model
from tests.cluster.serve_run import ServeRun
from tests.cluster.tool_model import ASKED, TOPICS, train
from tests.demo_answers import ANSWERS

CLIENT = Path(__file__).parent / "agent_client.py"
TOOLS_OF_VLLM = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
TIMEOUT_S = 300


def config(folder: Path) -> dict[str, Any]:
    """A router and the model with each engine."""
    router = {"name": "router", "import_path": "serve_app.app:router", "route_prefix": "/"}
    pt = model("pt", infer_backend="pt")
    vllm = model("vllm", infer_backend="vllm", engine_args=TOOLS_OF_VLLM, max_model_len=1024)
    for application in (pt, vllm):
        application["args"]["model"] = str(folder)
    return {"applications": [router, pt, vllm]}


def main() -> int:
    """Runs the agents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--engines", nargs="+", choices=["pt", "vllm"], default=["pt", "vllm"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "serve-app-tool-model")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if not (options.folder / "config.json").exists():
        print(json.dumps({"loss": train(options.folder)}), flush=True)
    questions = [{"question": each, "topic": TOPICS[each], "answer": ANSWERS[each]} for each in ASKED]
    serve = ServeRun(config(options.folder), cpus=4)
    try:
        serve.wait_until(lambda models: all(one["status"] == "ready" for one in models.values()) and bool(models))
        codes = [
            subprocess.run(
                [options.python, CLIENT, serve.url, name],
                input=json.dumps(questions), text=True, timeout=TIMEOUT_S, check=False,
            ).returncode
            for name in options.engines
        ]  # fmt: skip
        return max(codes)
    finally:
        serve.stop(signal.SIGTERM)
        serve.clean_up()


if __name__ == "__main__":
    sys.exit(main())
