"""The process that asks an engine: its answers are kept, and whatever it does, a plan gets an answer."""

import json
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.engines import facts_process, kept_facts, model_facts
from serve_app.facts.engine_facts import RankFacts, VllmFacts, facts_to_json
from serve_app.facts.known_facts import Answer, Question, facts_folder

FACTS = VllmFacts({1: RankFacts((1, 2), 3, 4, 5, ())}, {})
ANSWER = json.dumps({"facts": facts_to_json(FACTS)})
QUESTIONS = [Question("vllm", "0.32.0", {"hidden_size": size}, {"dtype": "auto"}) for size in (8, 16)]
HEAD = """
import json, os, signal, sys, time
jobs = json.load(open(sys.argv[1]))
sizes = [json.load(open(job["folder"] + "/config.json"))["hidden_size"] for job in jobs]

def say(**line):
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(line) + "\\n")
"""

Engine = Callable[[str], None]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Puts a small program in the place of the engine's, which counts its starts."""
    monkeypatch.setenv("SERVE_APP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(model_facts.MODULES, "vllm", "an_engine")

    def write(body: str) -> None:
        starts = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n"
        code = starts + HEAD + textwrap.dedent(body)
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
        assert sizes == [8, 16] and jobs[0]["dtype"] == "auto"
        for number in range(2):
            say(job=number)
            say(job=number, **json.loads('''{ANSWER}'''))
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
        ("say(job=7, facts=1)", "ended with 0"),
        ("say(job=0, facts=1); say(job=1, facts=1)", "an answer of another form"),
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
    engine("for number in range(2): say(job=number, error='a ValueError', is_refusal=True)")
    assert ask() == ask() == [Answer(None, "a ValueError", is_refusal=True)] * 2
    assert starts(tmp_path) == 1


def test_an_error_of_this_machine_is_not_kept(engine: Engine, tmp_path: Path) -> None:
    """The next plan may have the memory or the module that was missing."""
    engine("for number in range(2): say(job=number, error='a MemoryError')")
    assert ask() == ask() == [Answer(None, "a MemoryError")] * 2
    assert starts(tmp_path) == 2


def test_a_model_that_ends_the_process_costs_the_others_nothing(engine: Engine, tmp_path: Path) -> None:
    """It alone has the reason, its answer is not kept, and a new process goes on."""
    questions = [replace(QUESTIONS[0], config={"hidden_size": size}) for size in range(4)]
    engine(f"""
        for number, size in enumerate(sizes):
            say(job=number)
            if size == 1:
                sys.exit("it is too large")
            say(job=number, **json.loads('''{ANSWER}'''))
    """)
    found = model_facts.answers(questions, [None] * 4, lambda _: None)
    assert [answer.facts for answer in found] == [FACTS, None, FACTS, FACTS]
    assert found[1].problem == "its code ended with 1: it is too large"
    assert starts(tmp_path) == 2
    assert len(list(facts_folder().iterdir())) == 3


def test_processes_that_die_have_a_bound(engine: Engine, tmp_path: Path) -> None:
    """Each of many bad models may end one, and the last ones are not asked."""
    questions = [replace(QUESTIONS[0], config={"hidden_size": size}) for size in range(9)]
    engine("say(job=0); sys.exit('it is too large')")
    problems = [answer.problem for answer in model_facts.answers(questions, [None] * 9, lambda _: None)]
    most = facts_process.MOST_PROCESSES
    assert starts(tmp_path) == most < 9
    assert problems[:most] == ["its code ended with 1: it is too large"] * most
    assert all(problem.startswith(f"{most} processes ended before it was asked") for problem in problems[most:])


def test_each_rule_has_a_process(engine: Engine, tmp_path: Path) -> None:
    """A process has the platform of one of them."""
    questions = [replace(QUESTIONS[0], settings={"rules": rules}) for rules in ("cpu", "cuda")]
    engine(f"""
        assert len(jobs) == 1
        say(job=0, **json.loads('''{ANSWER}'''))
    """)
    assert model_facts.answers(questions, [None] * 2, lambda _: None) == [Answer(FACTS)] * 2
    assert starts(tmp_path) == 2


@pytest.mark.parametrize(("models", "time"), [(1, "25 seconds"), (5, "65 seconds"), (30, "5 minutes")])
def test_the_notice_says_how_long_it_takes(engine: Engine, models: int, time: str) -> None:
    """By the number of models."""
    engine("sys.exit(1)")
    questions = [replace(QUESTIONS[0], config={"hidden_size": size}) for size in range(models)]
    told: list[str] = []
    model_facts.answers(questions, [None] * models, told.append)
    assert f"up to about {time}" in told[0]


def test_nothing_of_the_current_folder_runs(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan may be made in a folder that somebody else has filled."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("torch", "statistics", "serve_app", "an_engine", "sitecustomize"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'hit')!r}, 'w').close()\n")
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:")
    engine(f"""
        import statistics
        say(job=0, **json.loads('''{ANSWER}'''))
        say(job=1, **json.loads('''{ANSWER}'''))
    """)
    assert ask() == [Answer(FACTS)] * 2
    assert not (tmp_path / "hit").exists()


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what it needs, and a relative path of modules means what it means here."""
    monkeypatch.chdir("/")
    own = {
        "HOME": "/home/a", "LC_ALL": "C.UTF-8", "HF_TOKEN": "hf_x", "OPENAI_API_KEY": "sk-x", "VLLM_API_KEY": "x",
        "AWS_SECRET_ACCESS_KEY": "x", "PYTHONPATH": ":lib::/opt", "PYTHONSTARTUP": "x.py", "TMPDIR": "/elsewhere",
    }  # fmt: skip
    found = facts_process.environment(own, Path("/scratch"))
    assert {name: found.get(name) for name in own} == {
        **dict.fromkeys(own), "HOME": "/home/a", "LC_ALL": "C.UTF-8", "PYTHONPATH": "/lib:/opt", "TMPDIR": "/scratch",
    }  # fmt: skip
    assert found["PYTHONSAFEPATH"] == "1"


def test_a_process_that_hangs_is_ended_with_its_children(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan waits for a bounded time."""
    monkeypatch.setattr(facts_process, "START_TIMEOUT_S", 1.0)
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


def test_only_the_newest_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was never finished goes after an hour."""
    monkeypatch.setattr(kept_facts, "MOST_KEPT", 3)
    now = time.time()
    for age in range(6):
        (tmp_path / f"{age}.json").write_text("{}")
        os.utime(tmp_path / f"{age}.json", (now - age, now - age))
    for name, age in (("old", 2 * kept_facts.STALE_S), ("young", 60.0)):
        (tmp_path / f"{name}.new").write_text("")
        os.utime(tmp_path / f"{name}.new", (now - age, now - age))
    kept_facts.prune(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.json", "1.json", "2.json", "young.new"]


CODE = {"trust_remote_code": True}
ELSEWHERE = {"auto_map": {"AutoConfig": "someone/code--configuration.Config"}}
REFUSED = VllmFacts({}, {1: "no"})


@pytest.mark.parametrize(
    ("config", "settings", "answer", "lasts"),
    [
        ({}, {}, Answer(FACTS), True),
        ({}, {}, Answer(REFUSED), True),
        ({}, {}, Answer(None, "no", is_refusal=True), True),
        ({}, {}, Answer(None, "no"), False),
        ({}, CODE, Answer(FACTS), True),
        ({}, CODE, Answer(REFUSED), False),
        ({}, CODE, Answer(None, "no", is_refusal=True), False),
        (ELSEWHERE, CODE, Answer(FACTS), False),
    ],
)
def test_which_answers_last(config: dict[str, Any], settings: dict[str, Any], answer: Answer, lasts: bool) -> None:
    """A model's own code may refuse for any reason."""
    assert kept_facts.is_lasting(Question("vllm", "0", config, settings), answer) is lasts
