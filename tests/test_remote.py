"""A server that speaks OpenAI's chat API: what it is asked, what it may answer, and the stages that ask it."""

import base64
import io
import itertools
import json
import os
import socket
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from chat_server import Answer, Server, chat_completion, text_of
from PIL import Image

from vlm_agents import endpoint, handover, remote, stages
from vlm_agents.__main__ import main
from vlm_agents.blocks import fenced
from vlm_agents.config import PromptConfig, RemoteConfig
from vlm_agents.config.rollout import EngineConfig
from vlm_agents.endpoint import on_this_machine, retry_after
from vlm_agents.envs.echo import COLORS, OVER
from vlm_agents.episodes import read_episodes
from vlm_agents.errors import ConfigError, DataError, ModelError
from vlm_agents.handover import Served, find, handed_over, look, with_model
from vlm_agents.pictures import Picture
from vlm_agents.policies import RemotePolicy
from vlm_agents.prompting import make_format
from vlm_agents.rater import Rater, read_score
from vlm_agents.remote import ChatClient, message_json
from vlm_agents.run import Run
from vlm_agents.snapshot import as_yaml
from vlm_agents.types import Message, Observation, Parsed, Prompt, Query, Reply, Sampling, Step, Turn

Play = Callable[..., dict[str, float]]


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds between tries."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Iterator[Callable[..., ChatClient]]:
    """`client(run="kept", retries=1, ...)`: a client of the server; all of a test share their cache, and those of a
    run its answers."""
    made: list[ChatClient] = []

    def make(run: str = "kept", **settings: Any) -> ChatClient:
        cfg = RemoteConfig(**{"url": server.url, "retries": 1, "cache": str(tmp_path / "cache"), **settings})
        made.append(ChatClient(cfg, tmp_path / run))
        return made[-1]

    yield make
    for one in made:
        one.close()


def say(text: str) -> Prompt:
    return (Message("user", (text,)),)


def complete(client: ChatClient, *texts: str, **settings: Any) -> list[str]:
    answers = client.complete([say(text) for text in texts], Sampling(8), temperature=0.7, **settings)
    return [answer.text for answer in answers]


def pictures_of(request: dict[str, Any]) -> list[Image.Image]:
    found = []
    for message in request["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                kind, data = part["image_url"]["url"].split(",")
                assert kind == "data:image/png;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
    return found


def color_of(picture: Image.Image) -> tuple[int, ...]:
    color = picture.convert("RGB").getpixel((0, 0))
    assert isinstance(color, tuple)
    return color


# ---- what is asked ---------------------------------------------------------------------------------------------------
def test_answers_come_in_order_from_as_many_threads_as_allowed(server: Server, client):
    together = threading.Barrier(3)

    def answer(request: dict[str, Any]) -> str:
        together.wait(timeout=5)  # breaks, and fails the test, unless three are asked at once
        time.sleep(0.02 * (9 - int(text_of(request))))  # the last one asked is the first one answered
        return "answer " + text_of(request)

    server.answer = answer
    assert complete(client(concurrency=3), *map(str, range(9))) == [f"answer {index}" for index in range(9)]
    assert server.most_at_once == 3


def test_a_request_is_openais_and_its_pictures_are_pngs(server: Server, client):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(256, size=(7, 9, 3), dtype=np.uint8) for _ in range(2)]
    pictures = tuple(Picture(Image.fromarray(array)) for array in pixels)
    prompt = (
        Message("system", ("rules",)),
        Message("user", (*pictures, "look")),
        Message("assistant", ("a",), token_ids=(1,)),
    )
    (answer,) = client(model="some/vlm").complete([prompt], Sampling(8), temperature=0.7, seeds=[5])
    assert (answer.text, answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("yes", "stop", 11, 3)
    (request,) = server.requests
    system, user, assistant = request.pop("messages")
    assert request == {"model": "some/vlm", "max_tokens": 8, "temperature": 0.7, "seed": 5}
    client("another").complete([say("a")], Sampling(8, ("</code>",), greedy=True), temperature=0.7)
    assert (server.requests[-1]["stop"], server.requests[-1]["temperature"]) == (["</code>"], 0.0)
    assert system == {"role": "system", "content": "rules"}
    assert assistant == {"role": "assistant", "content": "a"}
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    assert user["content"][-1] == {"type": "text", "text": "look"}
    received = pictures_of({"messages": [user]})
    assert all(np.array_equal(np.asarray(image), array) for image, array in zip(received, pixels, strict=True))


def test_pictures_are_sent_where_they_stand():
    picture = Picture(Image.new("RGB", (4, 4), "red"))
    content = message_json(Message("user", ("Is ", picture, " like ", picture, "?")))["content"]
    assert [part.get("text") for part in content] == ["Is ", None, " like ", None, "?"]


def test_a_proxy_is_not_asked_for_this_machine(server: Server, client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there
    assert complete(client(), "a") == ["yes"]


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.9/v1", True),
        ("http://[::1]:8000/v1", True),
        (f"http://{socket.gethostname().upper()}/v1", True),
        ("http://192.0.2.1/v1", False),  # a network for documents, which no machine is in
        ("http://example.com/v1", False),
        ("https://localhost/v1", False),  # the environment may name its certificates
    ],
)
def test_addresses_of_this_machine_are_known(url: str, ours: bool):
    assert on_this_machine(url) is ours


# ---- found by a file -------------------------------------------------------------------------------------------------
@pytest.fixture
def judge(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The server as a stage=serve of name=judge would hand it over, from the folder that the test is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(handover, "LOOK_S", 0.02)
    (tmp_path / "outputs/judge/serve").mkdir(parents=True)
    server.models = ["big"]
    host, key = socket.gethostname(), "a-key-of-16-char"
    return Served(server.url, "big", "0f", key, "vllm", host, os.getpid(), None, "2026-01-01T00:00:00+00:00")


FILE = Path("outputs/judge/serve/server.json")


def auto(**settings: Any) -> RemoteConfig:
    return RemoteConfig("auto", "judge", **{"wait_s": 0.0, "cache": "cache", "timeout_s": 5.0, **settings})


def test_the_file_leads_to_the_server_with_its_key_and_past_any_proxy(
    server: Server, judge: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    with handed_over(FILE, judge):
        assert FILE.stat().st_mode & 0o777 == 0o600
        with closing(ChatClient(auto(), tmp_path / "run")) as client:
            assert complete(client, "a") == ["yes"]
    assert not FILE.exists()
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer a-key-of-16-char"}
    kept = [path.read_text() for folder in ("run", "cache") for path in (tmp_path / folder).rglob("*.json")]
    assert len(kept) == 2
    assert not any("a-key" in text for text in kept)


def test_answers_are_those_of_the_weights_wherever_they_are_served(server: Server, judge: Served, tmp_path: Path):
    def ask(run: str, served: Served) -> None:
        with handed_over(FILE, served), closing(ChatClient(auto(), tmp_path / run)) as client:
            complete(client, "a")

    ask("first", judge)
    ask("second", replace(judge, url=server.url.replace("127.0.0.1", "localhost")))  # started again, elsewhere
    assert len(server.requests) == 1
    ask("third", replace(judge, weights="1e"))  # trained anew under the old name
    assert len(server.requests) == 2


def test_a_run_waits_for_the_server_and_names_its_model(compose_run, judge: Served):
    words = ("stage=collect", "name=judge", "stage.remote.url=auto", "stage.remote.wait_s=20")
    cfg = compose_run(*words, "stage.policy=remote")
    assert with_model(compose_run(*words)) == compose_run(*words)  # the expert plays, and waits for nobody

    def come() -> None:
        with handed_over(FILE, judge):
            done.wait()

    done = threading.Event()
    late = threading.Timer(0.1, come)
    late.start()
    try:
        named = with_model(cfg)
    finally:
        done.set()
        late.join()
    assert named == replace(cfg, stage=replace(cfg.stage, remote=replace(cfg.stage.remote, model="big")))
    Path(cfg.run_dir).mkdir()  # it goes on, or is asked for again, without its server
    (Path(cfg.run_dir) / "config.yaml").write_text(as_yaml(named))
    (Path(cfg.run_dir) / "DONE").touch()
    assert compose_run(*words, "stage.policy=remote") == named


def test_a_server_that_is_not_there_is_told_in_a_line(server: Server, judge: Served, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    cases: list[tuple[type[Exception], str, Served]] = [
        (
            ModelError,
            rf"the server of judge has ended \(process {ended.pid} on .*\): start it again",
            replace(judge, pid=ended.pid),
        ),
        (ModelError, r"judge doesn't answer at .* \(on .*, Slurm job 7\): start it again", replace(judge, job="7")),
        (ConfigError, "on another alone: start it with stage.host=node", replace(judge, host="another")),
    ]
    server.models = None
    for kind, message, served in cases:
        with handed_over(FILE, served), pytest.raises(kind, match=message):
            find(auto())
    with pytest.raises(ModelError, match=r"under outputs/judge/serve: .*stage=serve name=judge model=.*wait_s"):
        find(auto(wait_s=0.1))
    assert "model=... 'stage.lora_rank=<model.lora.rank>'" in str(look(EngineConfig(url="auto", server="mine")))
    assert capsys.readouterr().err.count("no server is up") == 1  # once, not at each look
    FILE.write_text("{}")
    with pytest.raises(DataError, match=r"server.json names no server: delete it"):
        find(auto())


def test_a_job_of_a_sweep_is_found_too_and_the_newest_counts(judge: Served):
    job = Path("multirun/judge/serve/0/server.json")
    job.parent.mkdir(parents=True)
    with handed_over(FILE, replace(judge, pid=2**30)), handed_over(job, replace(judge, since="2026-02-01", job="3")):
        assert find(auto()).job == "3"
        assert find(replace(auto(), server="multirun/judge/serve/0")).job == "3"


# ---- what is sent ----------------------------------------------------------------------------------------------------
def test_the_key_goes_into_the_header_only(server: Server, client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    complete(client(key_env="SOME_KEY"), "a")
    monkeypatch.delenv("SOME_KEY")
    complete(client(key_env="SOME_KEY"), "b")
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "Authorization" not in server.headers[1]
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 4  # in the run and in the cache
    assert not any("sk-secret" in text for text in kept)


def test_settings_say_what_is_sent(server: Server, client):
    server.answer = lambda request: str(len(server.requests))
    request = {
        "max_tokens": None,
        "seed": None,
        "max_completion_tokens": 512,
        "chat_template_kwargs": {"thinking": False},
    }
    own = client(request=request)
    (first,) = complete(own, "a", seeds=[1], readable=lambda index, text: text == "3", samples=3)
    assert first == "3"  # samples are other questions even where no seed is sent
    assert complete(own, "a", seeds=[5]) == ["4"]  # and so are other seeds
    for sent, temperature in zip(server.requests, (0.7, 1.0, 1.0, 0.7), strict=True):
        del sent["messages"]
        added = {"max_completion_tokens": 512, "chat_template_kwargs": {"thinking": False}}
        assert sent == {"model": "default", "temperature": temperature, **added}
    assert complete(client("other"), "a", seeds=[5]) == ["5"]  # what was sent otherwise was another question
    assert complete(client("again", request=dict(reversed(request.items()))), "a", seeds=[5]) == ["4"]


@pytest.mark.parametrize("request_fields", ["{seed: null, top_p: 0.9}", "{stop: ['a']}"])
def test_fields_of_a_request_come_from_the_command_line(compose_run, request_fields: str):
    cfg = compose_run("stage=collect", f"stage.remote.request={request_fields}")
    assert cfg.stage.remote.request in ({"seed": None, "top_p": 0.9}, {"stop": ["a"]})


@pytest.mark.parametrize(
    "fields", [{"model": "x"}, {"messages": []}, {"stream": True}, {"n": 2}, {"top_p": float("nan")}, {1: 2}, 3]
)
def test_fields_that_a_request_can_not_have(client, fields: Any):
    with pytest.raises(ConfigError, match=r"stage\.remote\.request"):
        client(request=fields)


SPELLED = ["<|im_end|>", "<|image_pad|>", "</s>", "<s>", "[INST]", "[/INST]", "<image>", "<end_of_turn>", "<<SYS>>"]


@pytest.mark.parametrize(
    "spelled", [*SPELLED, "<image_soft_token>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[IMG]"]
)
def test_what_is_said_never_becomes_a_control_token(spelled: str):
    for role in ("system", "user", "assistant"):
        content = message_json(Message(role, (f"fine{spelled}\n{spelled}",)))["content"]  # pyright: ignore[reportArgumentType]
        assert spelled not in content
        assert content.replace("\u2060", "") == f"fine{spelled}\n{spelled}"


@pytest.mark.parametrize(
    "text", ["<b>bold</b> [1] a < b |> c", "<think>so</think>", "[x](y) <div>", '{"a": [3]} <|', "turn <left> | right"]
)
def test_other_brackets_are_sent_as_they_are(text: str):
    assert message_json(Message("user", (text,)))["content"] == text


# ---- what is answered ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "finish", "text", "read"),
    [("left", "length", "left", "length"), (None, "stop", "", "stop"), ("a\ud800b", "content_filter", "a?b", "stop")],
    ids=["cut", "silent", "half a character"],
)
def test_odd_answers_are_data(
    server: Server, client, content: str | None, finish: str, text: str, read: Literal["stop", "length"]
):
    server.answer = lambda request: chat_completion(content, finish)
    (answer,) = client().complete([say("a")], Sampling(8), 1.0)
    assert (answer.text, answer.finish) == (text, read)


@pytest.mark.parametrize(
    "body",
    [b"<html>Welcome</html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"\xff"],
)
def test_what_is_no_chat_completion_is_an_error(server: Server, client, quick: None, tmp_path: Path, body: bytes):
    server.answer = lambda request: Answer(200, body)
    with pytest.raises(
        ModelError, match=r"2 times, .* no chat completion \(.*\): is stage\.remote\.url the part before"
    ):
        complete(client(), "a")
    assert len(server.requests) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "so"}, {"type": "thinking"}, {"type": "text", "text": " be it"}]},
        {"content": "so be it", "reasoning_content": "hm"},
    ],
    ids=["in parts", "with thoughts"],
)
def test_the_text_of_other_shapes_of_a_message(server: Server, client, message: dict[str, Any]):
    server.answer = lambda request: Answer(200, json.dumps({"choices": [{"message": message}]}).encode())
    assert complete(client(), "a") == ["so be it"]


@pytest.mark.parametrize(
    "usage",
    ["1e999", "-3", '"7"', "NaN", "true", "[]", "null", "1e300"],
)
def test_tokens_that_are_no_count_are_0(server: Server, client, usage: str):
    whole = f'{{"choices": [{{"message": {{"content": "yes"}}}}], "usage": {{"prompt_tokens": {usage}}}}}'
    bare = f'{{"choices": [{{"message": {{"content": "yes"}}}}], "usage": {usage}}}'
    server.answer = lambda request: Answer(200, (whole if text_of(request) == "a" else bare).encode())
    answers = client().complete([say("a"), say("b")], Sampling(8), 1.0)
    assert [(one.text, one.prompt_tokens, one.completion_tokens) for one in answers] == [("yes", 0, 0)] * 2


def endless(piece: bytes, pause: float = 0.0) -> Iterator[bytes]:
    while True:
        yield piece
        time.sleep(pause)


BOMB = zlib.compressobj(9, wbits=31)
GZIP_BOMB = BOMB.compress(b"[" * 2**20 * 64) + BOMB.flush()  # 64 MB in 65 kB
GZIPPED = {"Content-Encoding": "gzip", "Connection": "close"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(200, GZIP_BOMB, {"Content-Encoding": "gzip"}), r"no chat completion \(more than 8 MB\)"),
        (Answer(200, b"not packed", {"Content-Encoding": "gzip"}), r"no chat completion \(damaged gzip\)"),
        (Answer(500, GZIP_BOMB, {"Content-Encoding": "gzip"}), r"no chat completion \(more than 8 MB\)"),
        (Answer(200, b"", {"Content-Length": str(2**40)}, endless(b" " * 2**18)), r"\(more than 8 MB\)"),
        (Answer(200, b"{", {"Content-Length": "99"}, endless(b" ", 0.1)), r"no answer within 0\.3 s, 1 times: raise"),
        (Answer(200, b"[" * 100_000), r"no chat completion \(\[\[\["),
        (Answer(200, b""), r"1 times, what came back is no chat completion: is"),
        (Answer(200, b"{", {"Content-Length": "99"}, [b" "]), r"can't be reached \(.*\), 1 times"),
    ],
    ids=["bomb", "damaged", "refused with a bomb", "endless", "dripping", "nested", "empty", "broken off"],
)
def test_an_answer_has_so_much_time_and_room(server: Server, client, answer: Answer, said: str):
    server.answer = lambda request: answer
    start = time.monotonic()
    with pytest.raises(ModelError, match=said):
        complete(client(retries=0, timeout_s=0.3), "a")
    assert time.monotonic() - start < 4  # one try, and one of a blank question


def test_headers_that_drip_have_no_more_time(client):
    """Neither have those of the list of models."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=dripping, args=(connection,), daemon=True).start()

        def dripping(connection: socket.socket) -> None:
            with suppress(OSError), connection:
                for byte in itertools.cycle(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000):
                    connection.send(bytes([byte]))
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"no answer within 0\.3 s, 1 times"):
            complete(client(url=url, retries=0, timeout_s=0.3), "a")
        assert time.monotonic() - start < 2


def test_what_is_packed_all_the_same_is_read(server: Server, client):
    packed = zlib.compressobj(wbits=31)
    body = packed.compress(chat_completion("yes").body) + packed.flush()
    server.answer = lambda request: Answer(200, body, {"Content-Encoding": "gzip"})
    assert complete(client(), "a") == ["yes"]
    assert server.headers[0]["Accept-Encoding"] == "identity"


# ---- trying again ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 0])
def test_what_may_pass_is_tried_again(server: Server, client, status: int):
    server.answer = lambda request: "yes" if len(server.requests) > 1 else Answer(status, b"", {"Retry-After": "0.01"})
    assert complete(client(), "a") == ["yes"]
    assert len(server.requests) == 2


def test_the_wait_is_what_the_server_asks_for(server: Server, client):
    answers = [Answer(429, b"", {"Retry-After": "0.6"}), Answer(429), "yes"]
    server.answer = lambda request: answers[len(server.requests) - 1]
    assert complete(client(retries=2), "a") == ["yes"]
    first, second = np.diff(server.times)
    assert first >= 0.6  # our own would last 0.25 to 0.5 s
    assert 0.5 <= second < 2.0  # the second wait of our own lasts 0.5 to 1 s


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("0.5", 0.5), ("", 0.0), ("soon", 0.0), ("nan", 0.0), ("-3", 0.0)]
)
def test_retry_after_in_seconds(header: str, seconds: float):
    assert retry_after(header) == seconds


def test_retry_after_as_a_date():
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert 58.0 < retry_after(format_datetime(later, usegmt=True)) <= 60.0  # the header's date has whole seconds
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_a_server_that_wants_hours_is_given_up(server: Server, client):
    server.answer = lambda request: Answer(429, b"quota", {"Retry-After": "3600"})
    with pytest.raises(
        ModelError,
        match=r"status 429, 1 times \(quota\): wait for 3600 s\. Then give the same command",
    ):
        complete(client(retries=9), "a")


def test_a_server_that_keeps_failing_is_given_up(server: Server, client):
    server.answer = lambda request: Answer(500, b"out of\n memory")
    with pytest.raises(
        ModelError,
        match=r"/v1/chat/completions: status 500, 2 times \(out of memory\): see its log",
    ):
        complete(client(), "a")
    assert len(server.requests) == 2


def test_a_server_that_is_not_there(tmp_path: Path):
    gone = Server()
    gone.close()
    with pytest.raises(ModelError, match=r"can't be reached \(.*refused\), 2 times: is the server running there"):
        complete(ChatClient(RemoteConfig(gone.url, retries=1, cache=str(tmp_path / "cache")), tmp_path / "kept"), "a")


def test_a_server_that_does_not_answer(server: Server, client):
    awake = threading.Event()
    server.answer = lambda request: str(awake.wait(5))
    with pytest.raises(ModelError, match=r"no answer within 0\.2 s, 1 times: raise stage\.remote\.timeout_s or lower"):
        complete(client(timeout_s=0.2, retries=0), "a")
    awake.set()


def test_after_an_error_nothing_more_is_asked(server: Server, client):
    def answer(request: dict[str, Any]) -> Answer:
        time.sleep(0.02)
        return Answer(503, b"", {"Retry-After": "60"}) if text_of(request) == "1" else Answer(400)

    server.answer = answer
    start = time.monotonic()
    with pytest.raises(ModelError, match="status 400"):
        complete(client(concurrency=2), *map(str, range(100)))
    assert len(server.requests) < 50
    assert time.monotonic() - start < 5  # the one that waited was woken


@pytest.mark.parametrize(
    "answer",
    [
        Answer(529),
        Answer(200, b"<html>overloaded</html>"),
        Answer(200, b'{"error": {"message": "overloaded", "code": 502}}'),
        Answer(200, b'{"choices": []}'),
        Answer(200, b'{"choices": [', {"Content-Length": "500"}, [b" "]),
        Answer(503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Answer(503, b"", {"Retry-After": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"}),
    ],
    ids=["529", "a page", "an error", "no choice", "broken off", "a date", "no date"],
)
def test_what_gateways_say_for_a_while_is_tried_again(server: Server, client, quick: None, answer: Answer):
    server.answer = lambda request: "yes" if len(server.requests) > 1 else answer
    assert complete(client(), "a") == ["yes"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [404, 502, 503, 504])
def test_a_server_that_has_answered_may_be_away(
    server: Server, client, quick: None, caplog: pytest.LogCaptureFixture, status: int
):
    """While it restarts, a gateway says so in its place; that takes longer than a few tries."""
    server.answer = lambda request: Answer(status) if 1 < len(server.requests) < 6 else "yes"
    patient = client(retries=1)
    assert complete(patient, "a") == complete(patient, "b") == ["yes"]
    assert len(server.requests) == 1 + 5
    assert [record.getMessage().split("/v1")[1] for record in caplog.records] == [
        "/chat/completions is away: asked again for up to 10 minutes"
    ]


def test_a_server_that_goes_in_the_middle_of_a_batch_is_waited_for(server: Server, client, quick: None):
    """Of requests that begin together one may be answered before it goes."""
    tries = Counter[str]()

    def answer(request: dict[str, Any]) -> str | Answer:
        tries[asked := text_of(request)] += 1
        if asked == "b" and tries["b"] == 1:
            time.sleep(0.2)  # a is answered meanwhile
        return Answer(503) if asked == "b" and tries["b"] < 6 else "yes"

    server.answer = answer
    assert complete(client(retries=1, concurrency=2), "a", "b") == ["yes", "yes"]
    assert tries == {"a": 1, "b": 6}


def test_a_server_is_not_waited_for_without_end(server: Server, client, quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    last = replace(chat_completion("yes"), headers={"Connection": "close"})
    server.answer = lambda request: last
    patient = client(retries=1)
    complete(patient, "a")
    server.close()
    with pytest.raises(ModelError, match=r"can't be reached \(Connection refused\), \d+ times"):
        patient.complete([say("b")], Sampling(8), 0.7)


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_missing_and_a_wrong_key(server: Server, client, monkeypatch: pytest.MonkeyPatch):
    server.answer = lambda request: Answer(401, b"no such key: sk-secret")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ModelError, match=r"status 401 .*: \$SOME_KEY is empty: set it to a key"):
        complete(client(key_env="SOME_KEY"), "a")
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with pytest.raises(
        ModelError, match=r"status 401 \(no such key: \$SOME_KEY\): \$SOME_KEY holds a key that is refu"
    ):
        complete(client(key_env="SOME_KEY"), "a")
    assert len(server.requests) == 2


def test_a_key_that_no_header_can_hold_is_not_shown(client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_KEY", "sk-sec\nret")
    with pytest.raises(ConfigError, match=r"\$SOME_KEY holds characters that no key has") as caught:
        client(key_env="SOME_KEY")
    assert "sec" not in str(caught.value).replace("SOME_KEY", "")


def test_an_unknown_model_is_answered_with_those_there_are(server: Server, client):
    server.answer = lambda request: Answer(404, b'{"error": {"message": "no such model"}}')
    server.models = ["qwen-vl", "llava"]
    with pytest.raises(ModelError, match=r"set stage\.remote\.model to one of qwen-vl, llava\. Did you mean 'qwen-vl'"):
        complete(client(model="qwen_vl"), "a")


def test_a_wrong_path(server: Server, client):
    with pytest.raises(ModelError, match=r"/api/chat/completions: status 404 \(no such page\): stage\.remote\.url is"):
        complete(client(url=server.url.replace("v1", "api")), "a")
    moved = Answer(308, b"", {"Location": "https://elsewhere/v1/chat/completions"})
    server.answer = lambda request: moved
    with pytest.raises(ModelError, match=r"it moved to https://elsewhere/v1/chat/completions"):
        complete(client(), "a")


def test_a_request_that_is_refused_is_not_asked_again(server: Server, client):
    server.answer = lambda request: Answer(400, b"too many pictures")
    with pytest.raises(ModelError, match=r"status 400 \(too many pictures\)"):
        complete(client(), "a")
    assert len(server.requests) == 1


NO_ADDRESS = ["", "127.0.0.1:8000", "file:///etc/passwd", "http://", "http://host:port/v1", "http://host:99999/v1"]
SECRET = ["http://me:sk-1@host/v1", "http://:sk-1@host/v1", "https://h/v1?key=sk-1", "https://h/v1#sk-1"]


@pytest.mark.parametrize("url", [*NO_ADDRESS, *SECRET])
def test_only_plain_web_addresses(client, url: str):
    with pytest.raises(ConfigError, match=r"stage\.remote\.url must be http") as caught:
        client(url=url)
    assert "sk-1" not in str(caught.value)


def test_a_key_among_the_fields_of_a_request_is_not_shown(client):
    with pytest.raises(ConfigError, match=r"stage\.remote\.request holds what looks like a key") as caught:
        client(request={"extra": {"api_key": "sk-1"}})
    assert "sk-1" not in str(caught.value)


def test_a_key_where_its_variable_belongs_is_not_shown(client):
    with pytest.raises(ConfigError, match=r"stage\.remote\.key_env must be a variable's name") as caught:
        client(key_env="sk-1")
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [f"stage.remote.url='{SECRET[0]}'", "+stage.remote.key_env=sk-1", "stage.remote.request={api_key: sk-1}"],
)
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_secret_on_the_command_line_is_written_nowhere(
    override: str, sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it
    monkeypatch.setattr("sys.argv", ["vlm-agents", *sweep, "stage=collect", "stage.policy=remote", override])
    assert main() == 2
    out, err = capfd.readouterr()
    assert "a key belongs into the environment variable" in err
    assert "sk-1" not in out + err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("concurrency", 0), ("retries", -1), ("timeout_s", 0.0)])
def test_settings_that_can_not_work(client, name: str, value: float):
    with pytest.raises(ConfigError, match=f"stage.remote.{name}="):
        client(**{name: value})


def but_red(request: dict[str, Any]) -> str | Answer:
    return Answer(400, b'{"error": {"code": "content_filter"}}') if "red" in text_of(request) else "yes"


@pytest.mark.parametrize("batches", [["a", "red", "b"], ["red"]], ids=["among others", "alone"])
def test_a_prompt_that_is_refused_is_passed_over(server: Server, client, tmp_path: Path, batches: list[str]):
    server.answer = but_red
    first = client()
    answers = first.complete(
        list(map(say, batches)), Sampling(8), 0.7, readable=lambda _, text: text == "yes", samples=3
    )
    assert [answer.text for answer in answers] == ["" if text == "red" else "yes" for text in batches]
    refused = answers[batches.index("red")]
    assert "status 400" in refused.refused
    assert "content_filter" in refused.refused
    assert not refused.readable
    assert (first.counts()["unparsable"], first.counts()["answers"]) == (1, len(batches))
    assert len(server.requests) == len(batches)  # another sample would be refused too
    assert complete(client(), *batches) == [answer.text for answer in answers]
    assert len(server.requests) == len(batches)  # nor does a run that is continued ask again
    server.answer = lambda request: "yes"
    assert complete(client("other"), "red") == ["yes"]  # another run may


@pytest.mark.parametrize(
    "answer",
    [Answer(status) for status in (403, 413, 422, 451, 500, 503)] + [Answer(200, b"{}"), Answer(0)],
    ids=["403", "413", "422", "451", "500", "503", "no completion", "hung up"],
)
def test_whatever_becomes_of_one_prompt_alone(server: Server, client, quick: None, answer: Answer):
    server.answer = lambda request: answer if text_of(request) == "red" else "yes"
    assert complete(client(), "a", "red", "b") == ["yes", "", "yes"]


def test_a_limit_on_tokens_a_minute_is_no_prompt_s_fault(server: Server, client, quick: None):
    """A large prompt may be over it while a blank one is not: asked another time it is answered."""
    server.answer = lambda request: Answer(429, b"tokens per minute") if text_of(request) == "red" else "yes"
    with pytest.raises(ModelError, match=r"status 429, \d times .* give the same command again"):
        complete(client(), "red")
    server.answer = lambda request: "yes"
    assert complete(client(), "red") == ["yes"]


def test_the_blank_question_has_the_form_of_the_one_that_was_refused(server: Server, client):
    """So a limit on pictures, or a model that takes none, is no fault of one prompt."""
    server.answer = lambda request: Answer(400, b"at most 1 picture") if len(pictures_of(request)) > 1 else "yes"
    pictures = tuple(Picture(Image.new("RGB", (9, 9), color)) for color in ("red", "blue"))
    with pytest.raises(ModelError, match="at most 1 picture"):
        client().complete([(Message("system", ("rules",)), Message("user", (*pictures, "look")))], Sampling(8), 0.7)
    (request,), (blank,) = server.requests, server.blanks
    assert {name: value for name, value in blank.items() if name != "messages"} == {
        name: value for name, value in request.items() if name != "messages"
    }
    assert [message["role"] for message in blank["messages"]] == ["system", "user"]
    assert [color_of(picture) for picture in pictures_of(blank)] == [(255, 255, 255)] * 2
    assert "rules" not in json.dumps(blank)


def test_a_server_that_refuses_every_prompt_is_given_up(server: Server, client, tmp_path: Path):
    server.answer = lambda request: "yes" if text_of(request) == "Say yes." else Answer(400, b"no")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"status 400 \(no\): .* \(16 prompts in a row came to this\)"):
            complete(client(concurrency=1), *map(str, range(40)))
    assert len(server.requests) == 2 * 16
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # when that is mended, all are asked again
    server.answer = lambda request: "yes"
    assert complete(client(), "0") == ["yes"]


def refusal(param: str | None, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "param": param}}).encode()


@pytest.mark.parametrize(
    ("body", "fix"),
    [
        (
            refusal(
                "max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            ),
            r"set 'stage\.remote\.request=\{max_tokens: null, max_completion_tokens: 8\}' for a model",
        ),
        (refusal(None, "seed: Extra inputs are not permitted"), r"set 'stage\.remote\.request=\{seed: null\}', which"),
        (
            refusal("temperature", "Only the default (1) is taken"),
            r"request=\{temperature: null\}', which leaves it out",
        ),
        (b"[" * 100_000 + b" top_k unknown", r"'stage\.remote\.request=\{top_k: null\}'"),
        (refusal("model", "not today"), "the server can't serve this request, see what it says"),
    ],
    ids=["max_tokens", "seed", "temperature", "ours", "none"],
)
def test_a_field_that_a_model_refuses_is_told_with_its_setting(server: Server, client, body: bytes, fix: str):
    server.answer = lambda request: Answer(400, body)
    with pytest.raises(ModelError, match=fix):
        complete(client(request={"top_k": 3}), "a")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer", [Answer(402, b"Insufficient Balance"), Answer(429, b'{"error": {"code": "insufficient_quota"}}')]
)
def test_an_account_that_is_used_up(server: Server, client, answer: Answer):
    server.answer = lambda request: answer
    with pytest.raises(ModelError, match="the account is used up: fill it, then give the same command again"):
        complete(client(retries=9), "a")
    assert len(server.requests) == 1


KEY = "sk-s3cret/+key="
QUOTED_KEY = "sk-s3cret%2F%2Bkey%3D"


@pytest.mark.parametrize("key", [KEY, QUOTED_KEY], ids=["plain", "quoted"])
@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (308, r"it moved to http://127\.0\.0\.1:1/x{265}\$SOME_KEY: set"),
        (404, r"one of \$SOME_KEY\."),
        (500, r"1 times \(x{290} \$SOME_KEY\): see"),  # cut only after it
    ],
)
def test_a_key_that_a_server_repeats_is_not_shown(
    server: Server, client, monkeypatch: pytest.MonkeyPatch, key: str, status: int, shown: str
):
    monkeypatch.setenv("SOME_KEY", KEY)
    server.models = [key]
    headers = {"Location": f"http://127.0.0.1:1/{'x' * 265}{key}"} if status == 308 else {}
    server.answer = lambda request: Answer(status, f"{'x' * 290} {key}".encode(), headers)
    with pytest.raises(ModelError, match=shown) as caught:
        complete(client(key_env="SOME_KEY", retries=0), "a")
    assert "s3cret" not in str(caught.value)


def test_a_key_that_a_model_repeats_is_not_kept(
    server: Server, client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOME_KEY", KEY)
    server.answer = lambda request: Answer(400, KEY.encode()) if text_of(request) == "red" else f"{KEY}, {QUOTED_KEY}!"
    own = client(key_env="SOME_KEY")
    assert complete(own, "a", "red") == ["$SOME_KEY, $SOME_KEY!", ""]
    assert own.counts()["answers"] == 2
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 3  # both in the run, and one in the cache
    assert not any("s3cret" in text for text in kept)
    server.answer = lambda request: "yes" if text_of(request) == "b" else "none"
    monkeypatch.setenv("SOME_KEY", "yes")  # a word, as where no key is needed
    assert complete(client("other", key_env="SOME_KEY"), "b") == ["yes"]


def test_a_redirect_is_not_followed(server: Server, client, monkeypatch: pytest.MonkeyPatch):
    other = Server()
    monkeypatch.setenv("SOME_KEY", KEY)
    for status in (301, 302, 303, 307, 308):
        moved = Answer(status, b"", {"Location": f"{other.url}/chat/completions"})
        server.answer = lambda request, moved=moved: moved
        with pytest.raises(ModelError, match="it moved to"):
            complete(client(key_env="SOME_KEY"), "a")
    other.close()
    assert not other.headers


# ---- what is kept ----------------------------------------------------------------------------------------------------
def test_nothing_is_asked_twice(server: Server, client):
    server.answer = lambda request: f"{text_of(request)} {request['seed']}"
    first = client()
    assert complete(first, "a", "a", "b", seeds=[0, 1, 0]) == ["a 0", "a 1", "b 0"]
    assert complete(first, "c", "c", "c") == ["c 0"] * 3
    assert len(server.requests) == 4
    second = client()
    assert complete(second, "b", "c", "a", seeds=[0, 0, 1]) == ["b 0", "c 0", "a 1"]
    assert len(server.requests) == 4
    # four answers of 11 and 3 tokens
    costs = {"answers": 4.0, "prompt_tokens": 44.0, "completion_tokens": 12.0}
    others = {**{f"cached_{name}": 0.0 for name in costs}, "unparsable": 0.0}
    assert second.counts() == first.counts() == costs | others


def test_another_run_pays_only_for_what_is_new(server: Server, client):
    server.answer = lambda request: f"{text_of(request)} {request['seed']}"
    complete(client("first"), "a", "b", seeds=[0, 1])
    second = client("second")
    # a sample of another seed, and one at another temperature, are other questions
    assert complete(second, "a", "a", "b", seeds=[0, 1, 1]) == ["a 0", "a 1", "b 1"]
    assert second.complete([say("a")], Sampling(8), 0.8)[0].text == "a 0"
    assert len(server.requests) == 2 + 2
    for counted in (second, client("second")):  # a resumed run counts what the killed one asked
        counts = counted.counts()
        assert (counts["answers"], counts["prompt_tokens"], counts["completion_tokens"]) == (2, 22, 6)
        cached = [counts[f"cached_{name}"] for name in ("answers", "prompt_tokens", "completion_tokens")]
        assert cached == [2, 22, 6]


def test_a_run_finds_its_answers_at_another_address_and_another_run_does_not(server: Server, client):
    other = server.url.replace("127.0.0.1", "localhost")
    complete(client("first"), "a")
    complete(client("first", url=other), "a")
    assert len(server.requests) == 1  # its server has moved
    complete(client("second", url=f"{server.url}/"), "a")
    assert len(server.requests) == 1
    complete(client("third", url=other), "a")
    assert len(server.requests) == 2  # who knows which model has this name there


KEPT = {"text": "yes", "finish": "stop", "prompt_tokens": 1, "completion_tokens": 1}
DAMAGED = ["", '{"text": "ye', "[]", '{"score": 7}', "\0" * 40, "[" * 100_000]
DAMAGED += [json.dumps(KEPT | change) for change in ({"text": 3}, {"prompt_tokens": "1"}, {"readable": None})]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_answer_is_ignored_with_a_warning(
    server: Server, client, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
):
    complete(client(), "a")
    ((kept,), (cached,)) = ((tmp_path / name).iterdir() for name in ("kept", "cache"))
    sound = cached.read_text()
    kept.write_text(content)
    assert client().counts()["answers"] == 0
    assert complete(client(), "a") == ["yes"]  # from the cache
    assert len(server.requests) == 1
    for path in (kept, cached):
        path.write_text(content)
    caplog.clear()
    assert complete(client(), "a") == ["yes"]
    assert len(server.requests) == 2
    assert [record.getMessage().split(": ignored")[0] for record in caplog.records] == [str(kept), str(cached)]
    assert kept.read_text() == cached.read_text() == sound


def test_what_a_cached_answer_means_is_for_its_run_to_say(server: Server, client):
    """One run may read what another one could not."""
    complete(client("first"), "a", readable=lambda index, text: False)
    second = client("second")
    assert complete(second, "a", samples=2) == ["yes"]
    assert len(server.requests) == 1
    assert client("first").counts()["unparsable"] == 1
    assert second.counts()["unparsable"] == 0


def test_an_unreadable_answer_is_sampled_anew(server: Server, client):
    server.answer = lambda request: str(request["seed"])

    def ask(client: ChatClient) -> list[str]:
        # "a" is fine at once; "b" with the third sample, of seed 12; "c" never
        return complete(
            client,
            *"abc",
            seeds=[0, 10, 20],
            readable=lambda index, text: index == 0 or text == "12",
            samples=3,
        )

    assert ask(client()) == ["0", "12", "22"]
    assert len(server.requests) == 1 + 3 + 3
    hot = {request["seed"]: request["temperature"] for request in server.requests}
    assert hot == {0: 0.7, 10: 0.7, 11: 1.0, 12: 1.0, 20: 0.7, 21: 1.0, 22: 1.0}
    again = client()
    assert ask(again) == ["0", "12", "22"]
    assert len(server.requests) == 7
    assert again.counts()["unparsable"] == 2 + 3


# ---- the policy ------------------------------------------------------------------------------------------------------
def test_a_remote_reply_is_meant_and_seeded_by_its_query(server: Server, client):
    server.answer = lambda request: "left" if text_of(request) == "0" else "bananas"
    observation = Observation("", legal_actions=("left", "right"))

    def queries() -> list[Query]:
        return [Query(say(str(n)), observation, np.random.default_rng(n)) for n in range(2)]

    policy = RemotePolicy(client(), make_format(PromptConfig("action_only")), Sampling(8), 0.7, samples=2)
    replies = policy.reply(queries())
    assert [reply.text for reply in replies] == ["left", "bananas"]
    assert [reply.source for reply in replies] == ["server"] * len(replies)
    assert not any(reply.token_ids for reply in replies)
    assert policy.value(queries()) == [0.0, 0.0]
    seeds = sorted(request["seed"] for request in server.requests)
    first, second = (int(np.random.default_rng(n).integers(2**31)) for n in range(2))
    assert seeds == sorted([first, second, second + 1])  # only the illegal reply was asked for again


def test_a_remote_reply_ends_with_what_ends_it(server: Server, client):
    """Servers would leave a stop text out: none is asked for, and what is said behind it is cut off."""
    prompt_format = make_format(PromptConfig("tool_call", "full"))
    code = prompt_format.write("I look.", fenced("print(1)"), None)
    server.answer = lambda request: f"{code}\n<interpreter>1</interpreter>"
    policy = RemotePolicy(client(), prompt_format, Sampling(64, prompt_format.stop), 0.7, samples=1)
    (reply,) = policy.reply([Query(say("?"), Observation(""), np.random.default_rng(0))])
    assert reply.text == code
    assert "stop" not in server.requests[0]


def looks(request: dict[str, Any]) -> str:
    """Plays Echo by what the last picture shows."""
    names = {color: name for name, color in COLORS.items()}
    return names[color_of(pictures_of(request)[-1])]  # pyright: ignore[reportArgumentType]


def distracted(request: dict[str, Any]) -> str:
    """Half of the time talks of something else."""
    return "bananas" if request["seed"] % 7 < 4 else looks(request)


@pytest.fixture
def play(compose_run, server: Server) -> Play:
    """`play(folder, "stage=collect", ...)`: runs a stage on Echo, with the server as what is remote; the metrics."""

    def run(folder: Path, *words: str) -> dict[str, float]:
        settings = [f"stage.remote.url={server.url}", "stage.remote.retries=0", "stage.remote.concurrency=4"]
        settings += [f"stage.remote.cache={folder}_cache"]
        cfg = compose_run("env=echo", "prompt=action_only", "prompt.max_reply_tokens=4", *settings, *words)
        cfg.run_dir = str(folder)
        with Run.open(cfg, words) as opened:
            return stages.main(cfg, opened)

    return run


COLLECT = ("stage=collect", "stage.episodes=6", "stage.num_envs=4", "stage.noise=0")


def test_collect_from_a_server_that_sees(play: Play, server: Server, tmp_path: Path):
    server.answer = looks
    metrics = play(tmp_path, *COLLECT, "stage.policy=remote")
    assert metrics["collect/success"] == 1.0
    assert metrics["collect/unparsable"] == 0.0
    assert len(server.requests) == 18  # 6 episodes of 3 turns
    assert {request["max_tokens"] for request in server.requests} == {4}
    assert {request["temperature"] for request in server.requests} == {1.0}
    assert metrics["collect/prompt_tokens"] == 18 * 11
    assert metrics["collect/completion_tokens"] == 18 * 3
    assert "collect/unrated" not in metrics
    episodes = list(read_episodes(tmp_path))
    assert {episode.policy for episode in episodes} == {"remote"}
    assert {turn.rating for episode in episodes for turn in episode.turns} == {10.0}  # the expert's


def test_collect_from_a_server_that_talks_garbage(play: Play, server: Server, tmp_path: Path):
    server.answer = lambda request: "bananas"
    metrics = play(tmp_path, *COLLECT, "stage.policy=remote")
    assert metrics["collect/success"] == 0.0
    assert metrics["collect/invalid_rate"] == 1.0
    assert metrics["collect/unparsable"] == len(server.requests) == 54  # 6 episodes of 3 turns of 3 samples
    assert {episode.stop for episode in read_episodes(tmp_path)} == {"invalid"}


def test_an_interrupted_collect_ends_like_one_that_was_not(play: Play, server: Server, tmp_path: Path):
    words = [*COLLECT[:-1], "stage.policy=remote", "stage.rater=remote", "stage.noise=0.2"]

    def answer(request: dict[str, Any]) -> str:
        before, *after = map(color_of, pictures_of(request))
        if not after:
            return distracted(request)
        sound = before != COLORS["green"] and (before != COLORS["red"] or request["seed"] == 2)
        return '{"score": 4}' if sound else "hm"  # of red the third sample is sound, of green none

    server.answer = answer
    whole = play(tmp_path / "whole", *words)
    asked = sorted(json.dumps(request) for request in server.requests)
    assert whole["collect/unparsable"] > 0
    assert 0 < whole["collect/unrated"] < 18  # of 6 episodes of 3 turns

    answered: list[str] = []

    def until(limit: int) -> Callable[[dict[str, Any]], str | Answer]:
        def dying(request: dict[str, Any]) -> str | Answer:
            if len(answered) >= limit:
                return Answer(400, b"dead")
            answered.append(json.dumps(request))
            return answer(request)

        return dying

    for limit in (15, 40):
        server.answer = until(limit)
        with pytest.raises(ModelError, match="dead"):
            play(tmp_path / "parts", *words)
    server.answer = until(1000)
    assert play(tmp_path / "parts", *words) == whole
    assert sorted(answered) == asked
    files = [(tmp_path / name / "episodes.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_second_collect_asks_nothing(play: Play, server: Server, tmp_path: Path):
    server.answer = looks
    words = (*COLLECT, "stage.policy=remote", f"stage.remote.cache={tmp_path / 'cache'}")
    first = play(tmp_path / "first", *words)
    server.answer = lambda request: Answer(400)
    second = play(tmp_path / "second", *words)
    assert second["collect/success"] == 1.0
    for name in ("answers", "prompt_tokens", "completion_tokens"):
        assert second[f"collect/{name}"] == first[f"collect/cached_{name}"] == 0.0
        assert second[f"collect/cached_{name}"] == first[f"collect/{name}"] > 0.0
    metrics = json.loads((tmp_path / "second/summary.json").read_text())["metrics"]
    assert metrics["collect/cached_prompt_tokens"] == 18 * 11  # 6 episodes of 3 turns


def test_a_prompt_that_a_server_refuses_is_counted_and_told(
    play: Play, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def answer(request: dict[str, Any]) -> str | Answer:
        blank = text_of(request) == "Say yes."
        red = not blank and color_of(pictures_of(request)[-1]) == COLORS["red"]
        return Answer(400, b"content_filter \x1b]0;") if red else "red" if blank else looks(request)

    server.answer = answer
    metrics = play(tmp_path, *COLLECT, "stage.policy=remote")
    turns = [turn for episode in read_episodes(tmp_path) for turn in episode.turns]
    silent = [turn for turn in turns if not turn.reply.text]
    assert {color_of(turn.observation.images[0].image) for turn in silent} == {COLORS["red"]}
    assert {turn.parsed.error for turn in silent} == {"empty reply"}
    assert metrics["collect/invalid_rate"] == pytest.approx(len(silent) / len(turns), rel=1e-9)
    assert 0 < metrics["collect/unparsable"] == len(server.blanks) <= len(silent)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{len(silent)} of 18 replies hold no legal action: of 18 answers {len(silent)} can't be read: " in said
    assert f"{len(silent)} were refused (http" in said
    assert "\x1b" not in said


# ---- the rater -------------------------------------------------------------------------------------------------------
def test_a_remote_rater_sees_before_and_after(play: Play, server: Server, tmp_path: Path):
    """It gives 9 where the last picture is the black one after the end, says nothing sound of red, and 0 elsewhere."""

    def rate(request: dict[str, Any]) -> str:
        before, after = map(color_of, pictures_of(request))
        if before == COLORS["red"]:
            return "I can't say"
        return '{"score": 9}' if after == OVER else '```json\n{"score": 0.0}\n```'

    server.answer = rate
    metrics = play(tmp_path, *COLLECT[:-1], "stage.rater=remote", "stage.noise=0.3")
    turns = [turn for episode in read_episodes(tmp_path) for turn in episode.turns]
    expected = [
        None if color_of(turn.observation.images[0].image) == COLORS["red"] else 9.0 if turn.step.terminated else 0.0
        for turn in turns
    ]
    assert [turn.rating for turn in turns] == expected
    assert set(expected) == {None, 0.0, 9.0}  # no rating is no bad one
    assert metrics["collect/unrated"] == expected.count(None)
    unsound = sum(rate(request) == "I can't say" for request in server.requests)
    assert metrics["collect/unparsable"] == unsound >= 3


def test_a_rater_is_told_what_was_thought_and_done(server: Server, client):
    server.answer = lambda request: '{"score": 5}'
    white, grey = (Picture(Image.new("RGB", (4, 4), color)) for color in ("white", "grey"))
    reply = '{"thoughts": "to the door", "action": "go"}'
    turn = Turn(
        Observation("a room", (white,)),
        (Message("system", ("You play.",)), Message("user", (white, "a room"))),
        Reply(reply),
        Parsed("go", thought_span=(14, 25)),
        Step(Observation("a hall", (grey,)), 0.625, False, False, False, True, True),
    )
    assert Rater(client()).rate([turn]) == [5.0]
    (request,) = server.requests
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert [color_of(picture) for picture in pictures_of(request)] == [(255, 255, 255), (128, 128, 128)]
    lines = text_of(request).splitlines()
    for line in ("You play.", "Before the step: a room", "The agent thought: to the door", "The agent did: go"):
        assert line in lines
    assert lines[-1] == "After the step: a hall"
    assert "0.625" not in json.dumps(request)  # it doesn't know the reward


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 0}', 0.0),
        ('{"score": 10}', 10.0),
        ('I think {"reason": "good", "score": 7.5} it is', 7.5),
        ('{"score": 3} so {"score": 3.0}', 3.0),
        ('{"score": 3} or {"score": 4}', None),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"scores": 7}', None),
        ("{score: 7}", None),
        ("7", None),
        ("", None),
    ],
)
def test_only_a_sound_score_counts(text: str, score: float | None):
    assert read_score(text) == score


@pytest.mark.parametrize(("finish", "why"), [("stop", "18 say something else"), ("length", "18 were cut off")])
def test_a_rater_that_rates_nothing_is_told(
    play: Play, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], finish: str, why: str
):
    server.answer = lambda request: chat_completion("hm", finish)
    metrics = play(tmp_path, *COLLECT, "stage.rater=remote", "stage.episodes=2")
    assert metrics["collect/unrated"] == 6.0
    # 2 episodes of 3 steps, each asked for three times; but for what looks the same
    asked = len(server.requests)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"6 of 6 steps have no rating: of {asked} answers {asked} can't be read: {why.replace('18', str(asked))}"
        in said
    )
    assert "/remote" in said


def test_scores_are_read_in_linear_time():
    for text in ("{" * 400_000, '{"score": ' * 50_000, "{" + "a" * 400_000, '{"score": ' + "[" * 400_000 + "}"):
        start = time.process_time()
        assert read_score(text) is None
        assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('<think>maybe {"score": 3}?</think>{"score": 8}', 8.0),
        ('maybe {"score": 3}?</think>\n{"score": 8}', 8.0),
        ('<think>maybe {"score": 3}', None),
        ('[THINK]{"score": 3}[/THINK]{"score": 7}', 7.0),
        ('[THINK]maybe {"score": 2}', None),
    ],
)
def test_a_draft_is_no_score(text: str, score: float | None):
    assert read_score(text) == score


# ---- evaluation ------------------------------------------------------------------------------------------------------
def test_eval_plays_the_panel_on_a_server(play: Play, server: Server, tmp_path: Path):
    server.answer = distracted
    metrics = play(tmp_path, "stage=eval", "stage.policy=remote", "stage.episodes=8", "stage.num_envs=8")
    assert len(server.requests) == 24  # 8 episodes of 3 turns, one try each: bad replies are part of the result
    babbled = sum(distracted(request) == "bananas" for request in server.requests)
    assert 0 < babbled < 24
    assert metrics["eval/unparsable"] == babbled
    assert metrics["eval/invalid_rate"] == pytest.approx(babbled / 24, rel=1e-9)
    assert metrics["eval/success_expert"] == 1.0
    assert 0.0 <= metrics["eval/success_random"] <= 0.5
    assert not any("greedy" in name for name in metrics)


def test_a_run_begins_with_the_servers_first_answer(server: Server, compose_run, quick: None, tmp_path: Path):
    """Where it gives none, because it isn't there or takes no request of ours, nothing is left."""
    gone = Server()
    gone.close()
    server.answer = lambda request: Answer(401, b"{}")
    for stage in ("collect", "eval"):
        for url in (gone.url, server.url):
            words = (f"stage={stage}", "stage.policy=remote", "stage.remote.retries=0", f"stage.remote.url={url}")
            cfg = compose_run(*words, "env=echo", f"stage.remote.cache={tmp_path / 'cache'}")
            with pytest.raises(ModelError), Run.open(cfg, []) as run:
                stages.main(cfg, run)
            assert list(tmp_path.iterdir()) == []
