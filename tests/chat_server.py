"""A server that speaks OpenAI's chat API, and answers as a test wants it to."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One HTTP answer as it stands; status 0: hang up. `more` follows the body, piece by piece, until it is hung up."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    more: Iterable[bytes] = ()


class Server:
    """Answers each chat request with what `answer` makes of it, and notes what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], str | Answer] = lambda request: "yes"
        self.requests: list[dict[str, Any]] = []
        self.blanks: list[dict[str, Any]] = []  # asked to learn whether it answers anything
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.models: list[str] | None = None
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def post(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path != "/v1/chat/completions":
            return Answer(404, b"no such page")
        request = json.loads(body)
        with self._lock:
            (self.blanks if text_of(request) == "Say yes." else self.requests).append(request)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.answer(request)
        finally:
            with self._lock:
                self._at_once -= 1
        return chat_completion(answer) if isinstance(answer, str) else answer


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer in one piece: in two, TCP waits 40 ms for the second

        def do_POST(self) -> None:
            body = self.rfile.read(length := int(self.headers["Content-Length"]))
            if len(body) == length:  # else the client has given up
                self._send(server.post(self.path, dict(self.headers), body))

        def do_GET(self) -> None:
            listed = self.path == "/v1/models" and server.models is not None
            server.headers.append(dict(self.headers))
            models = json.dumps({"data": [{"id": name} for name in server.models or ()]}).encode()
            self._send(Answer(200, models) if listed else Answer(404, b"no such page"))

        def _send(self, answer: Answer) -> None:
            if answer.status == 0:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for key, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(answer.body)
            with suppress(ConnectionError):
                for piece in answer.more:
                    self.close_connection = True
                    self.wfile.write(piece)
                    self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def chat_completion(text: str | None, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return Answer(200, json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode())


def text_of(request: dict[str, Any]) -> str:
    """What the last message of a request says."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]
