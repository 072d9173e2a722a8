"""A local OpenAI-compatible server for tests, with faults to order and a log of what it did.

    from openai_server import Server  # pytest has this folder on its path

    with Server(lambda messages: "a pattern") as server:
        client = Client(journal, "test-model", server.url, "sk-test-0123456789")

It runs in a thread of this process. `reply(messages)` gives the text of the answer to a chat. `fault(asked)`, if there
is one, decides for each attempt what goes wrong: None for nothing, a name from FAULTS, or a Raw reply. `Asked.attempt`
counts the arrivals of the same messages, from 0, so that a rule does the same in each run, whatever the timing:

    Server(reply, fault=lambda asked: "503" if asked.attempt == 0 else None)  # each request fails once
    Server(reply, fault=random_faults(share=0.2, kinds=TRANSIENT + TRUNCATED + LASTING, seed=0))

`server.log` has one Served for each chat that arrived, in the order of arrival and noted before the reply goes out; its
outcome is "ok", the fault's name, "raw", "key", "model", "address" or "rejected".
"""

import asyncio
import contextlib
import email.utils
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MODEL = "test-model"
# Gone at the next attempt, unless the rule says otherwise
TRANSIENT = ("429", "429-after", "500", "503", "hang", "cut", "drop", "malformed", "html", "schema", "empty", "trickle")
TRUNCATED = ("truncated",)  # likewise; a client should ask with more room
LASTING = ("refusal", "filter", "filter-400", "overflow")  # of one request
FATAL = ("401", "403", "404", "quota")  # of the run
FAULTS = (*TRANSIENT, *TRUNCATED, *LASTING, *FATAL, "429-date", "429-ms")
TRICKLE_SECONDS = 0.02  # a byte


TOO_LONG = "This model's maximum context length is 16 tokens. Please reduce the length of the messages."
ERRORS = {
    "401": (401, "You may not.", "invalid_api_key"),
    "403": (403, "You may not.", "invalid_api_key"),
    "404": (404, "The model does not exist", "model_not_found"),
    "quota": (429, "You exceeded your current quota.", "insufficient_quota"),
    "overflow": (400, TOO_LONG, "context_length_exceeded"),
    "filter-400": (400, "The response was filtered by the content management policy.", "content_filter"),
}
GARBAGE = {
    "malformed": '{"choices": [{"message": {"role": "assistant", "conte',
    "html": "<html><body>Welcome to the network</body></html>",
}


class Asked(NamedTuple):
    """A chat that arrived."""

    messages: list[dict[str, str]]
    attempt: int  # chats of the same messages that arrived before
    body: dict[str, Any]

    @property
    def content(self) -> str:
        """The last message's."""
        return self.messages[-1]["content"]


class Served(NamedTuple):
    """A line of the log."""

    content: str  # of the last message
    outcome: str
    body: dict[str, Any]
    time: float  # time.monotonic() at its arrival


class Raw(NamedTuple):
    """A reply made by hand: text as it is, anything else as JSON."""

    status: int
    body: Any
    headers: dict[str, str] = {}  # noqa: RUF012


def random_faults(share: float, kinds: Iterable[str], seed: int) -> Callable[[Asked], str | None]:
    """A rule that gives this share of the attempts a fault, decided by the messages and the attempt alone."""
    kinds = tuple(kinds)

    def fault(asked: Asked) -> str | None:
        chance = random.Random(f"{seed}/{asked.content}/{asked.attempt}")
        return chance.choice(kinds) if chance.random() < share else None

    return fault


class Server:
    """See the module's docstring.

    Args:
        reply: the text of the answer to a chat's messages.
        fault: what goes wrong with an attempt.
        key: the one that is accepted; None accepts all.
        model: the one that is served; None serves all.
        rejects: fields of the body that get HTTP 400; also "json_schema" and "json_object", which are formats.
        delay: seconds before a reply.
        serial: work on one reply at a time, in the order of arrival, and to its end even if the client has left.
        usage: whether replies count their tokens.
        retry_after: seconds in the header of "429-after" and, as milliseconds, of "429-ms".
        port: 0 takes a free one.
    """

    def __init__(
        self,
        reply: Callable[[list[dict[str, str]]], str],
        fault: Callable[[Asked], str | Raw | None] | None = None,
        *,
        key: str | None = None,
        model: str | None = None,
        rejects: Iterable[str] = (),
        delay: float = 0.0,
        serial: bool = False,
        usage: bool = True,
        retry_after: float = 0.05,
        port: int = 0,
    ):
        self.log: list[Served] = []
        self._reply, self._fault = reply, fault or (lambda asked: None)
        self._key, self._model, self._rejects, self._delay = key, model, frozenset(rejects), delay
        self._turn = asyncio.Lock() if serial else None
        self._usage, self._retry_after, self.port = usage, retry_after, port
        self._seen: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0  # requests being answered
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def outcomes(self, content: str) -> list[str]:
        """What happened to the chats whose last message is `content`, in order."""
        return [served.outcome for served in self.log if served.content == content]

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(asyncio.current_task())
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
            connections.discard(asyncio.current_task())
            writer.transport.abort()

        listener = await asyncio.start_server(connected, "127.0.0.1", self.port, backlog=512)
        self.port = listener.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        listener.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; False when the connection is no longer of use."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            fault, raw = self._decide(line.split()[1], headers.get("authorization", ""), content)
            async with self._turn or contextlib.nullcontext():
                await asyncio.sleep(self._delay)
            return await self._send(reader, writer, fault, raw)
        finally:
            self.at_once -= 1

    def _decide(self, path: str, authorization: str, content: bytes) -> tuple[str, Raw]:
        """The outcome of a request, which is logged, and the reply."""
        body = json.loads(content)
        name = json.dumps(body["messages"])
        asked = Asked(body["messages"], self._seen[name], body)
        self._seen[name] += 1
        fault = self._fault(asked) or "ok"
        outcome, raw = (fault, None) if isinstance(fault, str) else ("raw", fault)
        rejected = self._rejects & {*body, body.get("response_format", {}).get("type")}
        if path != "/v1/chat/completions":
            outcome, raw = "address", Raw(404, {"detail": "Not Found"})
        elif self._key is not None and authorization != f"Bearer {self._key}":
            outcome, raw = "key", _error(401, f"Incorrect API key provided: {authorization[7:]}", "invalid_api_key")
        elif self._model is not None and body["model"] != self._model:
            outcome, raw = "model", _error(404, f"The model `{body['model']}` does not exist", "model_not_found")
        elif rejected:
            outcome, raw = "rejected", self._rejection(min(rejected))
        self.log.append(Served(asked.content, outcome, body, time.monotonic()))
        return outcome, raw or self._made(outcome, asked)

    def _rejection(self, field: str) -> Raw:
        if field == "max_tokens":
            words = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        elif field in ("json_schema", "json_object"):
            words = f"Invalid value for 'response_format': type {field} is not supported with this model."
        else:
            words = f"Unsupported value: '{field}' is not supported with this model."
        return _error(400, words, "unsupported_parameter", param=field)

    def _made(self, outcome: str, asked: Asked) -> Raw:
        """The reply of a fault; for those of the connection, the reply that it spoils."""
        if outcome in ERRORS:
            return _error(*ERRORS[outcome])
        if outcome[:3] in ("429", "500", "503"):
            after = {
                "429-after": {"Retry-After": str(self._retry_after)},
                "429-date": {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)},
                "429-ms": {"retry-after-ms": str(self._retry_after * 1000)},
            }
            return _error(int(outcome[:3]), "Not now.", headers=after.get(outcome, {}))
        if outcome in GARBAGE:
            return Raw(200, GARBAGE[outcome])
        if outcome == "schema":
            return Raw(200, {"object": "chat.completion", "answer": self._reply(asked.messages)})

        text = self._reply(asked.messages)
        message = {"role": "assistant", "content": text}
        finish = "stop"
        if outcome == "empty":
            message["content"] = ""
        elif outcome == "refusal":
            message |= {"content": None, "refusal": "I'm sorry, I can't help with that."}
        elif outcome == "truncated":
            message["content"], finish = text[: len(text) // 2], "length"
        elif outcome == "filter":
            message["content"], finish = "", "content_filter"
        body = {"object": "chat.completion", "model": MODEL}
        body["choices"] = [{"index": 0, "message": message, "finish_reason": finish}]
        if self._usage:
            prompt = sum(len(m["content"]) for m in asked.messages) // 4
            completion = len(message["content"] or "") // 4
            body["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion}
        return Raw(200, body)

    async def _send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str, raw: Raw) -> bool:
        content = (raw.body if isinstance(raw.body, str) else json.dumps(raw.body)).encode()
        if fault == "trickle":
            content += b" " * 10_000
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | raw.headers
        lines = [f"HTTP/1.1 {raw.status} -", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        head = "\r\n".join(lines).encode()
        if fault == "drop":
            return False
        if fault == "hang":
            await reader.read(1)  # until the client has had enough
            return False
        if fault == "cut":
            writer.write(head + content[: len(content) // 2])
            await writer.drain()
            return False
        if fault == "trickle":
            writer.write(head)
            for byte in content:
                writer.write(bytes([byte]))
                await asyncio.sleep(TRICKLE_SECONDS)
                if reader.at_eof() or writer.is_closing():
                    return False
        else:
            writer.write(head + content)
        await writer.drain()
        return True


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **more) -> Raw:
    return Raw(status, {"error": {"message": message, "type": "error", "code": code, **more}}, headers or {})
