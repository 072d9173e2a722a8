"""Chat completions of an OpenAI-compatible server.

    journal = Journal(run_dir / "completions.jsonl")
    async with Client(Server("gpt-4o-mini", key=key), journal, Budget(journal)) as client:
        completion = await client.complete(Request(messages, schema, max_tokens=200))

openai's package sends, waits and sends again. What becomes of one request is a status of its completion. What no
request can survive (a wrong key, no quota, no server) is a UserError before the first completion; after it, what was
answered is worth keeping, and every further completion is "stopped", as it is where the budget ends.
"""

import logging
import math
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn, cast
from urllib.parse import parse_qsl

import anyio  # what openai itself runs on; asyncio.timeout needs Python 3.11
import httpx2
import openai

from mistral_sae.cli import UserError, one_line
from mistral_sae.explain.journal import Budget, Journal, Tokens, estimate_tokens, most_tokens
from mistral_sae.explain.prompts import fold_system
from mistral_sae.explain.replies import ANSWERED, FORMAT, SYSTEM_ROLE, Reply, read_reply
from mistral_sae.explain.server import INSTEAD, NOTES, OPENAI, Server, then
from mistral_sae.explain.types import Completion, Request, Status

CONNECT_SECONDS = 10.0
IN_A_ROW = 5  # requests in vain, with no completion between, that end the run
PAUSE = 8.0  # seconds before a server that stays busy or away through all of openai's retries is asked again
SILENCE = 5.0  # seconds without an answer that the progress bar keeps to itself


class Client:
    """Completes requests by a server, each of them once: `async with Client(...) as client`, in one event loop.

    The first request goes alone, so that a wrong key, or what the server does not take, is found out once. Each reply
    lets one more go at once, up to `server.concurrency`; a server that is busy, or late, halves them, as TCP does.
    Nothing is printed or logged, and the key is in nothing that leaves here.

    Attributes:
        stopped: why the budget or the server ended the run, in one line; "" while neither has.
        is_broken: whether it was the server.
        notes: what the server does not take, by the part of requests that is left out for it, and which constants
            would help.
    """

    def __init__(self, server: Server, journal: Journal, budget: Budget):
        self.server, self._journal, self._budget = server, journal, budget
        self.stopped, self.is_broken = "", False
        self.notes: dict[str, str] = {}
        self._taken: set[str] = set()  # response formats of completed requests
        self._rooms: dict[str, int] = {}  # tokens that truncated replies needed, by the title of the request's schema
        self._turns = anyio.CapacityLimiter(1)  # of requests
        self._slots, self._width = anyio.CapacityLimiter(1), 1.0  # of attempts
        self._halved, self._answered = 0.0, -math.inf  # when these last were; when a request last was
        self._began, self._trouble = math.inf, ""  # when the first went out; what is in the way of the next answer
        self._served = False  # whether any was
        self._done = self._known = self._retries = self._slow = self._in_vain = 0
        for name in ("openai", "httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        url, _, query = (server.base_url or OPENAI).partition("?")
        self._openai = openai.AsyncOpenAI(
            base_url=url,
            api_key=server.key or "none",  # the package insists on one
            default_query=dict(parse_qsl(query)),
            default_headers={"api-key": server.key} if server.key and "api-version" in query else {},  # Azure's
            max_retries=server.attempts - 1,
            timeout=openai.Timeout(server.timeout, connect=min(CONNECT_SECONDS, server.timeout)),
            http_client=_Http(self._attempt),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    @property
    def progress(self) -> str:
        """What the run has used so far, and what it waits for, in a few words."""
        silent = time.monotonic() - max(self._answered, self._began)
        words = [
            f"${self._budget.dollars(self._budget.spent):.3f}" if self._budget.prices else "",
            f"{self._done} requests, {self._retries} retries",
            f"{self._slow} late" if self._slow else "",
            f"{self._slots.total_tokens:g} at once",
            f"no answer for {silent:.0f} s{self._trouble}" if SILENCE < silent < math.inf else "",
            "stopping" if self.stopped else "",
        ]
        return ", ".join(filter(None, words))

    @property
    def report(self) -> list[str]:
        """What asking came to, and which constants would have helped, a line each."""
        spent, is_error = self._budget.spent, self.is_broken and not self._served
        stopped = [f"stopped: {self.stopped}"] if self.stopped and not is_error else []
        used = (
            f"{self._done:,} requests, {self._retries:,} retries, {self._known:,} answered from the journal; "
            f"{spent.prompt:,} tokens read, {spent.completion:,} written{self._budget.cost(spent)}"
        )
        return [*stopped, *self.notes.values(), used]

    async def complete(self, request: Request) -> Completion:
        """The completion of a request: from the journal, else from the server and then in the journal.

        Its tokens are those of all attempts; one whose reply was lost counts with the most it can have used.

        Raises UserError where no request can succeed, and none has, and where the journal cannot be written.
        """
        keys, call = self.server.keys(request), _Call(request)
        if known := self._journal.get(*keys):
            self._known += 1
            return known
        try:
            async with self._turns:
                status, text = await self._within_deadline(call)
        except BaseException as error:
            if any(call.spent):  # which counts even so
                self._keep(keys[0], Completion("failed", "the run was stopped", *call.spent))
            if not isinstance(error, _Ended):
                raise
            if self.is_broken and not self._served:
                raise UserError(self.stopped) from None
            return Completion("stopped", self.stopped)
        self._done += 1
        completion = Completion(cast(Status, status), self.server.without_key(text), *call.spent)
        self._keep(keys[status == "truncated"], completion)
        return completion

    def _keep(self, key: str, completion: Completion) -> None:
        self._journal.append(key, completion, self._budget.dollars(Tokens(*completion[2:])))

    async def _within_deadline(self, call: "_Call") -> tuple[str, str]:
        """A request's status, and its reply or the reason."""
        with call.scope:  # whose deadline is set when the first attempt goes out
            return await self._ask(call)
        last = call.reply.text or "none was finished"
        text = f"no answer within {self.server.deadline:g} s; the last attempt: {last}"
        return self._failed("late", text, ends=not self._served)

    def _failed(self, kind: str, text: str, ends: bool = False) -> tuple[str, str]:
        """The failure of a request; the end of the run where it is one of many, with no answer between."""
        self._in_vain += 1
        if ends or self._in_vain == IN_A_ROW:
            self._end(kind, f"{self._in_vain} requests in a row had {text}" if self._in_vain > 1 else text)
        return "failed", text

    async def _ask(self, call: "_Call") -> tuple[str, str]:
        """Ask with more and more room for the reply, until it fits."""
        kind, longest = (call.request.schema or {}).get("title", ""), self.server.longest_reply
        least = min(call.request.max_tokens, longest)
        room, cut_off = max(least, self._rooms.get(kind, 0)), ""
        while True:
            status, text = await self._answer(call, room)
            if status == "truncated":
                cut_off = text or "the reply was cut off before it began"
                if room == longest:
                    self.notes["room"] = NOTES["room"].format(longest=longest)
                    return status, cut_off
                room = min(max(2 * room, self._rooms.get(kind, 0)), longest)
            elif status == "looping":
                self.notes["loops"] = NOTES["loops"]
                return "truncated", text
            elif status not in ("overflow", "rejected"):
                if kind and cut_off:
                    self._rooms[kind] = max(room, self._rooms.get(kind, 0))
                return status, text
            elif cut_off:
                return "truncated", cut_off
            elif room > least:
                room = least  # what another request needed was too much for this one
            else:
                return "failed" if status == "rejected" else status, text

    async def _answer(self, call: "_Call", room: int) -> tuple[str, str]:
        """Ask in the form that the server takes, when it has time."""
        while True:
            call.body, call.most = self._body(call.request, room), most_tokens(call.request, room)
            call.kinds.clear()
            token = _CALL.set(call)
            try:
                await self._openai.chat.completions.with_raw_response.create(**call.body)
            except (openai.APIStatusError, openai.APIConnectionError):
                pass  # call.reply says what it was
            finally:
                _CALL.reset(token)
            reply, follows = call.reply, then(call.reply.kind, self._served).follows
            if part := self._to_blame(call.body, reply):
                self.notes[part] = NOTES["part"].format(part=part, instead=INSTEAD.get(part, "without it"))
            elif follows == "pause":
                await anyio.sleep(PAUSE)
            elif follows == "end":
                self._end(reply.kind, reply.text)
            elif follows == "failed":
                return self._failed(reply.kind, f"{call.kinds.total()} attempts failed, the last with {reply.text}")
            else:
                return reply.kind, reply.text

    async def _attempt(self, send: Callable[[], Awaitable[httpx2.Response]]) -> httpx2.Response:
        """Send once, within the timeout and the budget; openai sends again what the response's header says."""
        call = _CALL.get()
        async with self._slots:
            if reached := self.stopped or await self._budget.reserve(call.most):
                self.stopped = self.stopped or reached
                raise _Ended
            reply: Reply | None = None
            began = anyio.current_time()
            if call.reply.kind:
                self._retries += 1
            else:
                call.scope.deadline = began + self.server.deadline
            self._began = min(self._began, began)
            try:
                with anyio.fail_after(self.server.timeout):  # httpx's own timeout starts again with each byte
                    response = await send()
                reply = read_reply(response, call.request)
            except Exception as error:
                reply = self._broken(error)
                raise httpx2.ReadTimeout(reply.text) if isinstance(error, TimeoutError) else error from None
            finally:
                spent = call.most if reply is None or reply.spent is None else reply.spent
                self._budget.settle(call.most, spent)
                call.spent = call.spent.plus(spent)
                if reply:
                    call.reply = self._learn(call, reply, began)
                    again = self._goes_again(call)
        response.headers["x-should-retry"] = str(again).lower()
        if again and response.is_success:
            response.status_code = 502  # which it should have had
        return response

    def _goes_again(self, call: "_Call") -> bool:
        """Whether a request may be sent once more after its last reply; the end of the run where the rule says so."""
        kind = call.reply.kind
        attempts, follows = then(kind, self._served)
        call.kinds[kind] += 1
        if call.kinds[kind] < attempts:
            return True
        if follows == "end":
            self._end(kind, call.reply.text)
        return False

    def _broken(self, error: Exception) -> Reply:
        """What an attempt without a response means."""
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return Reply("no server", str(error) or "no connection")
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            return Reply("late", f"no reply within {self.server.timeout:g} s", None)
        return Reply("fault", f"the connection broke ({type(error).__name__})", None)

    def _learn(self, call: "_Call", reply: Reply, began: float) -> Reply:
        """Note what the outcome of an attempt says of the server; the reply in the light of what is known of it."""
        kind, now = reply.kind, anyio.current_time()
        self._trouble = "" if kind in ANSWERED else f" ({one_line(self.server.without_key(reply.text))[:60]})"
        if kind in ANSWERED:
            self._served, self._in_vain, self._answered = True, 0, now
            self._turns.total_tokens = self.server.concurrency
            self._taken.add(call.body.get("response_format", {}).get("type", ""))
            self._width = min(self.server.concurrency, self._width + (1 / self._width if self._halved else 1))
            estimate = estimate_tokens(*(message["content"] for message in call.request.messages))
            # Ollama cuts long prompts without a word; estimates of those are better than that
            if reply.spent and estimate > 1000 and 0 < reply.spent.prompt < 0.75 * estimate:
                self.notes["prompts"] = NOTES["prompts"].format(read=reply.spent.prompt, sent=round(estimate, -2))
        elif kind == "late" and not self._served:  # this request may be to blame: let another one try
            self._width = self._turns.total_tokens = min(2, self.server.concurrency)
        elif kind in ("busy", "late") and began >= self._halved:  # else it was out with one that has halved them
            self._width, self._halved = max(1.0, self._width / 2), now
        self._slots.total_tokens = int(self._width)
        if kind in ("busy", "late"):
            call.scope.deadline = max(call.scope.deadline, self._answered + self.server.deadline)
        if kind == "late":
            self._slow += 1
            self.notes["slow"] = NOTES["slow"].format(times=self._slow, text=reply.text)
        if kind == "forbidden":  # by a filter that does not like this request, if the key is good
            return reply._replace(kind="filtered" if self._served else "key")
        return reply

    def _body(self, request: Request, room: int) -> dict[str, Any]:
        """The arguments of `chat.completions.create`, without what the server has rejected."""
        extra = {"stream": False, **self.server.sampling}  # some servers stream unless told
        body: dict[str, Any] = {
            "model": self.server.model,
            "messages": fold_system(request.messages) if "a system message" in self.notes else request.messages,
            "max_completion_tokens" if "max_tokens" in self.notes else "max_tokens": room,
            "extra_body": {name: value for name, value in extra.items() if name not in self.notes},
        }
        if request.schema is not None and "json_schema" not in self.notes:
            schema = {"name": "reply", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.schema is not None and "json_object" not in self.notes:
            body["response_format"] = {"type": "json_object"}
        return body

    def _to_blame(self, body: dict[str, Any], reply: Reply) -> str:
        """The part of a body that the server rejected; "" for none that can be left out."""
        is_system, words = body["messages"][0]["role"] == "system", reply.text
        if reply.kind == "fault" and is_system and not self._served:  # `transformers serve` says no more
            return "a system message"
        if reply.kind != "rejected":
            return ""
        if "max_tokens" in body and "max_completion_tokens" in words:
            return "max_tokens"
        if named := [name for name in body["extra_body"] if re.search(rf"\b{re.escape(name)}\b", words)]:
            return named[0]
        if is_system and re.search(SYSTEM_ROLE, words, re.IGNORECASE):
            return "a system message"
        form = body.get("response_format", {}).get("type", "")
        return form if form not in self._taken or re.search(FORMAT, words, re.IGNORECASE) else ""

    def _end(self, kind: str, words: str) -> NoReturn:
        """End the run: nothing more is asked; what is in flight may still be answered."""
        if not self.stopped:
            self.stopped, self.is_broken = self.server.ending(kind, words), True
        raise _Ended


class _Call:
    """A request that is being asked: what is sent, what came of the last attempt, and what all have cost."""

    def __init__(self, request: Request):
        self.request, self.reply, self.spent, self.most = request, Reply(), Tokens(), Tokens()
        self.body: dict[str, Any] = {}
        self.kinds = Counter[str]()  # of the replies to this body
        self.scope = anyio.CancelScope()


_CALL: ContextVar[_Call] = ContextVar("call")


class _Http(openai.DefaultAsyncHttpxClient):
    """openai's HTTP client, each of whose attempts is made by a function."""

    def __init__(self, attempt: Callable[[Callable[[], Awaitable[httpx2.Response]]], Awaitable[httpx2.Response]]):
        super().__init__()
        self._attempt = attempt

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        send = super().send
        return await self._attempt(lambda: send(request, **options))


class _Ended(openai.OpenAIError):  # which openai hands on
    """No further request is answered; `Client.stopped` says why."""
