"""How a workload is sent, to a real server."""

import asyncio
from collections.abc import Iterator

import pytest

from serve_app.tuning.load import FIRST_TOKEN, Target, run_level
from serve_app.tuning.measurement import Level, Measurement
from serve_app.tuning.workload import Ask, Workload
from tests.tuning.token_server import TOKEN_S, TokenServer

MADE = Workload("made", tuple(Ask(10 + number, 5, 4) for number in range(50)))


@pytest.fixture
def server() -> Iterator[TokenServer]:
    """A server that makes four answers at one time."""
    running = TokenServer(4)
    yield running
    running.stop()


def seen(server: TokenServer, workload: Workload, level: Level, seconds: float = 0.5) -> Measurement:
    """What a level has shown."""
    return asyncio.run(run_level(Target(server.url, "m", 100), workload, level, 0.1, seconds))


def test_made_requests_have_the_lengths_of_the_workload(server: TokenServer) -> None:
    """Their prompts begin alike and differ then, and their answers may not end before their time."""
    found = seen(server, MADE, Level(clients=2))
    assert not found.errors
    first, second = server.seen[:2]
    assert [len(body["prompt"]) for body in server.seen[:3]] == [10, 11, 12]
    assert first["prompt"][:4] == second["prompt"][:4]
    assert first["prompt"][4:10] != second["prompt"][4:10]
    assert all(FIRST_TOKEN <= token < 100 for body in server.seen for token in body["prompt"])
    assert (first["max_tokens"], first["ignore_eos"], first["model"]) == (5, True, "m")


def test_the_prompts_are_the_same_in_each_run(server: TokenServer) -> None:
    """So that settings are compared by the same load."""
    seen(server, MADE, Level(clients=1), 0.1)
    before = [body["prompt"] for body in server.seen[:3]]
    server.seen.clear()
    seen(server, MADE, Level(clients=1), 0.1)
    assert [body["prompt"] for body in server.seen[:3]] == before


def test_no_prompt_of_a_level_comes_again_at_the_next(server: TokenServer) -> None:
    """A cache of prompts would have it. What all share comes again."""
    for level in (Level(clients=1), Level(clients=2)):
        seen(server, MADE, level, 0.1)
    prompts = [tuple(body["prompt"]) for body in server.seen]
    assert len(set(prompts)) == len(prompts) > 4
    assert len({prompt[:4] for prompt in prompts}) == 1


def test_tokens_and_times_are_measured(server: TokenServer) -> None:
    """Within what the server can do."""
    found = seen(server, MADE, Level(clients=4), 1.0)
    assert found.tpot_p50_s >= TOKEN_S
    assert found.ttft_p50_s >= TOKEN_S
    assert 0 < found.tokens_per_s <= 4 / TOKEN_S
    assert found.latency_s >= 5 * TOKEN_S


def test_more_clients_than_room_wait_and_it_shows(server: TokenServer) -> None:
    """In the time to the first token."""
    few, many = seen(server, MADE, Level(clients=4)), seen(server, MADE, Level(clients=16))
    assert many.ttft_p50_s > 2 * few.ttft_p50_s


def test_requests_of_an_open_load_do_not_wait_for_each_other(server: TokenServer) -> None:
    """About a hundred a second come, and the server can answer less than half of them."""
    found = seen(server, Workload("slow", tuple(Ask(10, 50) for _ in range(50))), Level(rate=100.0), 0.5)
    assert found.requests >= 20
    assert not found.errors
    assert server.most_inside > 12
    assert found.ttft_p95_s > found.ttft_p50_s


def test_answers_that_take_longer_than_the_level_are_measured(server: TokenServer) -> None:
    """Its warm-up waits for the first ones, and it lasts until some have begun and ended in it."""
    slow = Workload("slow", tuple(Ask(10, 200) for _ in range(50)))
    found = seen(server, slow, Level(clients=4), 0.2)
    assert found.requests >= 4
    assert found.latency_s >= 200 * TOKEN_S
    assert 100 < found.tokens_per_s <= 4 / TOKEN_S
    assert found.seconds > 0.4


def test_the_load_goes_on_until_the_last_request_of_the_level_has_ended(server: TokenServer) -> None:
    """Or that one would be alone on the server."""
    found = seen(server, Workload("slow", tuple(Ask(10, 100) for _ in range(50))), Level(clients=8), 0.5)
    assert len(server.seen) > found.requests + 8


def test_the_loads_of_several_models_are_sent_at_the_same_time(server: TokenServer) -> None:
    """The quick one is measured as long as the slow one, and neither is alone meanwhile."""
    quick, slow = Workload("quick", (Ask(10, 5),)), Workload("slow", tuple(Ask(10, 100) for _ in range(50)))

    async def both() -> list[Measurement]:
        together, target = asyncio.Barrier(2), Target(server.url, "m", 100)
        return await asyncio.gather(
            *(run_level(target, one, Level(clients=2), 0.1, 0.3, together) for one in (quick, slow))
        )

    few, many = asyncio.run(both())
    assert many.seconds > 0.6
    assert few.seconds == pytest.approx(many.seconds, abs=0.1)


def test_an_answer_of_a_log_may_end_where_it_ends(server: TokenServer) -> None:
    """Its line has only a bound."""
    seen(server, Workload("log", (Ask(3, 5, 0, {"prompt": "Once"}, is_exact=False),)), Level(clients=1), 0.1)
    assert "ignore_eos" not in server.seen[0]


def test_texts_of_a_log_are_sent_as_they_are(server: TokenServer) -> None:
    """To the endpoint that they are for."""
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    found = seen(server, Workload("log", (Ask(3, 5, 0, chat), Ask(3, 2, 0, {"prompt": "Once"}))), Level(clients=1))
    assert not found.errors
    first, second = sorted(server.seen[:2], key=lambda body: "prompt" in body)  # A level may begin at any line.
    assert first["messages"] == chat["messages"]
    assert (second["prompt"], second["max_tokens"]) == ("Once", 2)


@pytest.mark.parametrize(("prompt", "words"), [("refuse", "503 "), ("cut", "the stream ended before its end")])
def test_what_fails_is_told(server: TokenServer, prompt: str, words: str) -> None:
    """A refusal and a stream that ends too early."""
    found = seen(server, Workload("log", (Ask(1, 5, 0, {"prompt": prompt}),)), Level(clients=1))
    (error,) = found.errors
    assert error.startswith(words)
    assert found.requests == 0


def test_a_server_that_is_gone_is_told() -> None:
    """By the client's own error."""
    target = Target("http://127.0.0.1:1", "m", 100)
    found = asyncio.run(run_level(target, MADE, Level(clients=1), 0.0, 0.2))
    assert "ClientConnectorError" in next(iter(found.errors))
