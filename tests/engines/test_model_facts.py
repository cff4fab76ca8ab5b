"""The process that asks an engine: its answers are kept, and whatever it does, a plan gets an answer."""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.engines import model_facts
from serve_app.facts.engine_facts import RankFacts, VllmFacts, facts_to_json
from serve_app.facts.known_facts import Answer, Question, facts_folder

FACTS = VllmFacts({1: RankFacts((1, 2), 3, 4, 5, ())}, {})
ANSWER = json.dumps({"facts": facts_to_json(FACTS)})
QUESTIONS = [Question("vllm", "0.32.0", {"hidden_size": size}, {"dtype": "auto"}) for size in (8, 16)]
READ = "jobs = json.load(open(sys.argv[1]))\nsizes = [json.load(open(j['folder'] + '/config.json')) for j in jobs]\n"

Engine = Callable[[str], None]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Puts a small program in the place of the engine's, which counts its starts."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(model_facts.MODULES, "vllm", "an_engine")

    def write(body: str) -> None:
        starts = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n"
        code = "import json, os, signal, sys, time\n" + starts + READ + textwrap.dedent(body)
        (tmp_path / "an_engine.py").write_text(code)

    return write


def starts(tmp_path: Path) -> int:
    """How often the program was started."""
    file = tmp_path / "starts"
    return len(file.read_text()) if file.exists() else 0


def ask(told: list[str] | None = None) -> list[Answer]:
    """Both questions."""
    return model_facts.answers(QUESTIONS, [None, None], (told if told is not None else []).append)


def test_one_process_answers_all_and_the_next_plan_needs_none(engine: Engine, tmp_path: Path) -> None:
    """And a line is shown before it starts."""
    engine(f"""
        assert sizes == [{{"hidden_size": 8}}, {{"hidden_size": 16}}] and jobs[0]["dtype"] == "auto"
        json.dump([json.loads('''{ANSWER}''')] * 2, open(sys.argv[2], "w"))
    """)
    told: list[str] = []
    assert ask(told) == [Answer(FACTS)] * 2
    assert len(told) == 1
    assert "2 models" in told[0]
    assert ask(told) == [Answer(FACTS)] * 2
    assert (starts(tmp_path), len(told)) == (1, 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit('no such thing')", "no such thing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
        ("open(sys.argv[2], 'w').write('[')", "ended with 0"),
        ("json.dump([], open(sys.argv[2], 'w'))", "ended with 0"),
        ("json.dump([{'facts': 1}] * 2, open(sys.argv[2], 'w'))", "an answer of another form"),
    ],
)
def test_a_process_that_fails_is_a_reason(engine: Engine, body: str, words: str) -> None:
    """Not an exception, and nothing is kept."""
    engine(body)
    for answer in ask():
        assert answer.facts is None
        assert words in answer.problem
    assert not facts_folder().exists()


def test_what_the_engine_refuses_is_kept(engine: Engine, tmp_path: Path) -> None:
    """It would refuse it again, and a plan need not wait for that."""
    engine("json.dump([{'error': 'a ValueError'}] * 2, open(sys.argv[2], 'w'))")
    assert ask() == ask() == [Answer(None, "a ValueError")] * 2
    assert starts(tmp_path) == 1


def test_a_process_that_hangs_is_ended_with_its_children(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan waits for a bounded time."""
    monkeypatch.setattr(model_facts, "TIMEOUT_S", 1.0)
    pid = tmp_path / "pid"
    engine(f"""
        child = os.fork()
        if child:
            open({str(pid)!r}, "w").write(str(child))
        time.sleep(600)
    """)
    assert "did not answer within 1 s" in ask()[0].problem
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_engine_that_is_not_installed_is_said(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A laptop plans what is known, and names what is missing."""
    engine("sys.exit(1)")
    monkeypatch.setattr(model_facts, "engine_versions", lambda: {"vllm": "", "pt": ""})
    assert [answer.problem for answer in ask()] == ["vllm is not installed here"] * 2
    assert starts(tmp_path) == 0


def test_the_process_is_this_interpreter(engine: Engine, tmp_path: Path) -> None:
    """It must see the packages of this environment, and no GPU."""
    engine(f"""
        open({str(tmp_path / "seen")!r}, "w").write(sys.executable + "|" + os.environ["CUDA_VISIBLE_DEVICES"])
        sys.exit(1)
    """)
    ask()
    assert (tmp_path / "seen").read_text() == f"{sys.executable}|"
