"""Chat completions from any OpenAI-compatible server, of which none is lost and none is asked for twice.

    with locked(run_dir), Journal(run_dir / "completions.jsonl") as journal:
        async with Client(journal, model, base_url, key) as client:
            completion = await client.complete(Request(messages, schema, max_tokens=200))

What happens to one request is a status of its completion; "stopped" is that of all for which the budget has nothing
left. What would happen to all of them otherwise (a wrong key, an unknown model, no quota, no server) is a ClientError
before the first completion; after it, what was answered is worth keeping, and the rest is "stopped".
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import anyio  # what openai itself runs on; asyncio.timeout needs Python 3.11
import openai

from mistral_sae.cli import UserError
from mistral_sae.explain.dialect import Dialect
from mistral_sae.explain.journal import Journal, JournalError, request_key
from mistral_sae.explain.replies import Reply, estimate_tokens, most_tokens, read_error, read_response
from mistral_sae.explain.throttle import FIRST_LIMIT, FREE, Budget, BudgetReached, Limit, Prices, Tokens
from mistral_sae.explain.types import Completion, Request

__all__ = ["Client", "ClientError", "DryRun", "Prices", "Usage"]

OPENAI = "https://api.openai.com/v1"
SAMPLING = {"temperature": 0.0}  # unless a client is told otherwise
CONNECT_SECONDS = 10.0
FIRST_CONNECTIONS = 3  # attempts to reach a server that has not answered yet
FIRST_AT_OWN = 2  # attempts out at once at first at a server that is not OpenAI's: many answer one after the other
LATE_IN_A_ROW = 5  # requests past their deadlines, with no completion between, after which nobody is there
# Keys for servers that want none; anything else of six characters and more is a secret
PLACEHOLDERS = frozenset(
    {"ollama", "lm-studio", "no-key", "no-key-required", "sk-no-key-required", "not-needed", "placeholder", "unused"}
)
LONGEST_BACKOFF = 60  # times the first one
REASON_LENGTH = 300  # characters of a server's words that are kept
LONG_PROMPT = 1000  # tokens from which an estimate is good enough to tell that a prompt was cut short
CUT_PROMPT = 0.75  # of the estimate: who reads less has cut it

FATAL = {
    "key": "the server at {address} refused the key ({words}), expected one that it accepts: check OPENAI_API_KEY",
    "no key": "the server at {address} wants a key ({words}), found none: set OPENAI_API_KEY",
    "model": "the server at {address} has no model {model!r} ({words}), expected one that it serves: "
    "correct OPENAI_MODEL, or load the model there",
    "address": "found no chat completions for model {model!r} under {address} ({words}), expected an OpenAI-compatible "
    "server: check OPENAI_BASE_URL, which mostly ends in /v1, and OPENAI_MODEL",
    "quota": "the account at {address} has no quota left ({words}), expected some: add credit and start again to go on",
    "region": "the server at {address} serves nobody from here ({words}), expected one that does: set OPENAI_BASE_URL",
    "no server": "found no server at {address} ({words}), expected one: start it, or correct OPENAI_BASE_URL",
    "late": "the server at {address} does not answer ({words}), expected a completion of one of them: look "
    "whether it still runs, and start again to go on",
}
REFUSING = frozenset({"key", "no key", "quota", "region"})  # of FATAL, what every attempt that is out meets as well


class ClientError(UserError):
    """Why no request can succeed. One line: what was found, what was expected, what to do."""


class Usage(NamedTuple):
    """What a run has used so far."""

    done: int  # requests that ended, whatever their status
    known: int  # requests answered from the journal
    retries: int  # attempts beyond the first of each request
    prompt_tokens: int  # of all attempts; one whose reply was lost counts with the most it can have used
    completion_tokens: int
    dollars: float
    concurrency: int  # attempts that may be out at once, at present


class Client:
    """A Completer that asks a server: `async with Client(...) as client`. One event loop, one model.

    It prints nothing, and silences the loggers of openai and what that is made of. The key is in no text that leaves
    it.

    Args:
        journal: where completions are looked up and written down.
        model: the server's name for it.
        base_url: of the server, mostly ending in /v1; None for OpenAI's.
        key: None for a server that wants none.
        sampling: fields of the request's body, such as `{"temperature": 0.0}`, which is the default, or `top_p`,
            `seed`, `reasoning_effort`, `chat_template_kwargs`. One that the server rejects by name is left out.
        prices: dollars per million tokens.
        max_dollars: that all runs with this journal may spend together; None for no bound.
        max_tokens: likewise, prompts and replies.
        concurrency: attempts out at once, at most.
        timeout: seconds an attempt may take, however slowly it trickles in.
        deadline: seconds a request may take from its first attempt, with all waiting in between. They begin anew
            with every answer to another request while the server is too busy for this one, so that it fails where the
            server answers nobody for so long, and not where there is much to do.
        attempts: how often a request is tried that fails for other reasons than a server which turns it away as busy or
            is not there.
        backoff: seconds before the first retry, about; doubles each time.
        longest_reply: tokens that a reply may have; up to these, `max_tokens` of a truncated one is doubled. Later
            requests whose schemas have the same title start with what that one needed. With a larger bound, what stayed
            truncated is asked anew.

    Attributes:
        address: of the server as it may be shown, without user, password and query.
        stopped: why the budget or the server ended the run, in one line; "" while neither has.
        is_broken: whether it was the server.

    Raises:
        ClientError: the base URL or the key cannot be one.
    """

    def __init__(
        self,
        journal: Journal,
        model: str,
        base_url: str | None = None,
        key: str | None = None,
        *,
        sampling: dict[str, Any] | None = None,
        prices: Prices = FREE,
        max_dollars: float | None = None,
        max_tokens: int | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        deadline: float = 600.0,
        attempts: int = 6,
        backoff: float = 0.5,
        longest_reply: int = 4096,
    ):
        self.model, self.stopped, self.is_broken = model, "", False
        self.address = _address(base_url or OPENAI)
        self._has_key, self._secret = bool(key), _checked_key(key or "")
        self._journal = journal
        self._asked = SAMPLING if sampling is None else dict(sampling)  # what completions are known by
        self._dialect = Dialect(model, self._asked)
        self._limit = Limit(concurrency, FIRST_LIMIT if base_url is None else FIRST_AT_OWN)
        self._most_late = min(LATE_IN_A_ROW, max(2, concurrency))
        self._budget = Budget(prices, max_dollars, max_tokens, journal.dollars, journal.tokens)
        self._timeout, self._deadline = timeout, deadline
        self._most_faults, self._backoff, self._longest_reply = attempts, backoff, longest_reply
        self._done = self._known = self._retries = 0
        self._reached = False  # whether the server ever answered
        self._notes: dict[str, str] = {}  # besides the dialect's, by what they are about
        self._timeouts = self._late_in_a_row = 0
        self._served = False  # whether that was ever a completion
        self._refused = False  # whether what is out when the run is ended costs nothing
        self._ended = ""  # why the run is over
        self._scopes: set[anyio.CancelScope] = set()  # of the requests that are being asked
        self._turned_away: set[anyio.CancelScope] = set()  # of those whose last attempt found the server busy
        self._rooms: dict[str, int] = {}  # what truncated replies needed, by the title of the request's schema
        self._away_until = 0.0  # when a server that wants more patience than there is may be asked again
        self._asking: dict[str, asyncio.Future[Completion | None]] = {}
        for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):  # the last four before and since openai 3
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._openai = openai.AsyncOpenAI(
            base_url=base_url or OPENAI,
            api_key=key or "none",  # the package insists on one
            max_retries=0,  # one place decides, and that is here
            timeout=openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    @property
    def usage(self) -> Usage:
        """What this run has used so far."""
        spent = self._budget.spent
        return Usage(
            self._done, self._known, self._retries, *spent, self._budget.dollars, concurrency=int(self._limit.value)
        )

    @property
    def notes(self) -> list[str]:
        """What the server does not take, and what it is asked for in its place; and which constants would help, if any.

        A line each, as it is found out.
        """
        slow = (
            f"{self._timeouts:,} attempts had no reply within {self._timeout:g} s: raise REQUEST_TIMEOUT, or lower "
            "CONCURRENCY for a server that answers one after the other"
        )
        return [*self._dialect.notes, *self._notes.values(), *([slow] if self._timeouts else [])]

    async def complete(self, request: Request) -> Completion:
        """The completion of a request: from the journal, else from the server and then in the journal.

        The same request asked twice at once goes out once. A completion's tokens are those of all its attempts. Where
        the next attempt might cost more than is left it is "stopped", which the journal does not keep, and so are all
        that are not out yet; and all, if a server that has completed one before refuses everything or is gone.

        Raises:
            ClientError: no request can succeed, and none has; every other that is being asked ends with it, too.
        """
        keys = keys_of(request, self.model, self._asked, self._longest_reply)
        key = keys[0]
        while True:
            if known := self._journal.get(*keys):
                self._known += 1
                return known
            if key not in self._asking:
                break
            if completion := await asyncio.shield(self._asking[key]):  # None: whoever asked was stopped
                return completion
        completion = None
        self._asking[key] = asyncio.get_running_loop().create_future()
        try:
            completion = await self._ask(key, request)
            return completion
        except (BudgetReached, _Stopped) as reason:
            self.stopped = self.stopped or str(reason)
            return Completion("stopped", self.stopped)
        finally:
            self._asking.pop(key).set_result(completion)

    async def _ask(self, key: str, request: Request) -> Completion:
        """Ask, and write down what came of it."""
        tally = _Tally()
        try:
            status, text = await self._within_deadline(request, tally)
        except BaseException:  # the run is stopped; what this request has cost counts even so
            if any(tally.spent):
                with contextlib.suppress(JournalError):
                    self._write(key, Completion("failed", "the run was stopped", *tally.spent))
            raise
        text = self._scrubbed(text)
        if status in ("failed", "overflow"):
            text = _one_line(text)
        completion = Completion(status, text, *tally.spent)
        try:
            self._write(key, completion)
        except JournalError as error:
            self._end("journal", str(error))
        self._done += 1
        return completion

    def _write(self, key: str, completion: Completion) -> None:
        if completion.status == "truncated":
            key = _cut_at(key, self._longest_reply)
        spent = Tokens(completion.prompt_tokens, completion.completion_tokens)
        self._journal.append(key, completion, self._budget.prices.dollars(spent))

    async def _within_deadline(self, request: Request, tally: "_Tally") -> tuple[str, str]:
        """A request's status, and its reply or the reason."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if not self._ended:
                    return await self._attempts(request, scope, tally)
            finally:
                self._scopes.remove(scope)
                self._turned_away.discard(scope)
        if self._ended:
            raise self._ending()
        self._late_in_a_row += 1
        if self._late_in_a_row >= self._most_late:
            self._end("late", f"{self._late_in_a_row} requests in a row had {self._late(tally)}")
        return "failed", self._late(tally)

    async def _attempts(self, request: Request, scope: anyio.CancelScope, tally: "_Tally") -> tuple[str, str]:
        """Try until there is a status, within `scope`, whose deadline is set when the first attempt goes out."""
        kind = (request.schema or {}).get("title")
        least = room = min(request.max_tokens, self._longest_reply)
        cut_off = None
        since, faults, waits = None, 0, 0
        while True:
            async with self._limit.slot(since):
                if (wait := self._away_until - anyio.current_time()) > self._deadline:
                    return "failed", self._impatient(wait, tally)
                if since is None:
                    since = anyio.current_time()
                    scope.deadline = since + self._deadline
                    room = max(room, self._rooms.get(kind, 0))
                else:
                    self._retries += 1
                body = self._dialect.body(request, room)
                reply = self._once_served(await self._attempt(body, request, room, tally))
            tally.problem = reply.text
            self._reached |= reply.kind != "no server"
            is_late = reply.kind == "busy" and reply.spent is None
            self._timeouts += is_late
            if reply.kind == "busy":
                self._turned_away.add(scope)
            else:
                self._turned_away.discard(scope)

            if reply.kind in ("ok", "refused", "filtered"):
                if kind is not None and cut_off is not None:
                    self._rooms[kind] = max(room, self._rooms.get(kind, 0))
                return reply.kind, reply.text
            if reply.kind == "truncated":
                cut_off = reply.text or "the reply was cut off before it began"
                if room >= self._longest_reply:
                    self._notes.setdefault(
                        "room",
                        f"replies did not fit into {self._longest_reply:,} tokens: raise MAX_REPLY_TOKENS, or have a "
                        "model that thinks do less of it (SAMPLING)",
                    )
                    return "truncated", cut_off
                room = min(max(2 * room, self._rooms.get(kind, 0)), self._longest_reply)
                continue
            if reply.kind in ("rejected", "doubtful") and self._dialect.adapt(body, reply.text):
                continue
            if reply.kind in ("overflow", "rejected", "failed"):
                if cut_off is not None:  # the smaller room had been accepted
                    return "truncated", cut_off
                if room > least:  # what another needed may be too much for this one
                    room = least
                    continue
                return ("overflow" if reply.kind == "overflow" else "failed"), reply.text

            waits += 1
            faults += is_late or reply.kind in ("fault", "doubtful")
            if reply.kind in FATAL and not (reply.kind == "no server" and (self._reached or waits < FIRST_CONNECTIONS)):
                self._end(reply.kind, reply.text)
            if faults == self._most_faults:
                return "failed", f"{faults} attempts failed, the last with {reply.text}"
            wait = self._backoff * min(2 ** min(waits - 1, 20), LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            if reply.wait is not None:
                # No sooner than it says, and not all at the same moment
                wait = max(reply.wait, self._backoff) + self._backoff * random.random()
            if reply.wait and anyio.current_time() + wait > scope.deadline:
                return "failed", self._impatient(reply.wait, tally)
            if reply.kind != "busy" or reply.wait is None:  # else the limit holds it
                await anyio.sleep(wait)

    async def _attempt(self, body: dict[str, Any], request: Request, room: int, tally: "_Tally") -> Reply:
        """Send a request once, within the budget and the timeout."""
        most = Tokens(most_tokens(request.messages, request.schema), room)
        await self._budget.reserve(most)
        spent = most  # until the server says better: it may charge for a reply that is lost on the way
        began = anyio.current_time()
        reply = Reply("busy", f"no reply within {self._timeout:g} s", None)
        try:
            with anyio.move_on_after(self._timeout):  # the package's own timeout starts again with each byte
                reply = await self._send(body)
            if reply.spent is not None:
                spent = reply.spent
        except asyncio.CancelledError:
            spent = Tokens() if self._refused else most
            raise
        finally:
            self._budget.settle(most, spent)
            tally.spent = Tokens(tally.spent.prompt + spent.prompt, tally.spent.completion + spent.completion)
        if reply.kind == "busy":
            self._limit.overwhelmed(began)
            if reply.wait is not None:
                self._hold(reply.wait)
        elif reply.kind in ("ok", "refused", "filtered", "truncated"):
            self._served, self._late_in_a_row = True, 0
            self._dialect.accepted(body)
            self._compare(estimate_tokens(request.messages), spent.prompt)
            self._limit.succeeded()
            for scope in self._turned_away:
                scope.deadline = anyio.current_time() + self._deadline
        return reply

    def _once_served(self, reply: Reply) -> Reply:
        """What a reply means of a server that takes the key and knows the model, as a completion has shown.

        Then a 403 is a filter's before it, which does not like this request, and a 404 a balancer's, which passes.
        """
        if self._served and reply.kind == "forbidden":
            return reply._replace(kind="filtered")
        if self._served and reply.kind in ("model", "address"):
            return reply._replace(kind="fault")
        return reply._replace(kind="key") if reply.kind == "forbidden" else reply

    def _compare(self, estimate: int, read: int) -> None:
        """Note once where a server left out a part of a prompt, which Ollama does without a word."""
        if estimate > LONG_PROMPT and 0 < read < CUT_PROMPT * estimate:
            self._notes.setdefault(
                "prompts",
                f"the server read only {read:,} of about {round(estimate, -2):,} tokens of a prompt: raise its context "
                "length (Ollama: OLLAMA_CONTEXT_LENGTH)",
            )

    def _hold(self, seconds: float) -> None:
        """Send nothing for as long as the server asks; what waits fails at once where that is beyond the deadline."""
        if seconds > self._deadline:
            self._away_until = max(self._away_until, anyio.current_time() + seconds)
        else:
            self._limit.pause(max(seconds, self._backoff), self._backoff)

    async def _send(self, body: dict[str, Any]) -> Reply:
        try:
            response = await self._openai.chat.completions.create(**body)
        except Exception as error:  # whatever the package makes of a reply that is no chat completion
            return read_error(error)
        return read_response(response, body["messages"])

    def _end(self, kind: str, words: str) -> NoReturn:
        """End the run: every request that is being asked ends with this error, or as stopped if some were answered."""
        if not self._ended:
            kind = "no key" if kind == "key" and not self._has_key else kind
            words = _one_line(self._scrubbed(words))
            template = FATAL.get(kind, "{words}")
            self._ended = template.format(address=self.address, model=self.model, words=words)
            self._refused = kind in REFUSING or (kind in FATAL and not self._served)
            if self._served and kind in FATAL:
                self.stopped, self.is_broken = self._ended, True
            for scope in self._scopes:
                scope.cancel()
        raise self._ending()

    def _ending(self) -> "ClientError | _Stopped":
        return _Stopped(self._ended) if self.is_broken else ClientError(self._ended)

    def _impatient(self, wait: float, tally: "_Tally") -> str:
        return f"the server asks for {round(wait, 1):g} s of patience, and there is {self._late(tally)}"

    def _late(self, tally: "_Tally") -> str:
        return f"no answer within {self._deadline:g} s; the last attempt: {tally.problem or 'none was finished'}"

    def _scrubbed(self, text: str) -> str:
        """`text` without the key, which some servers repeat."""
        return text.replace(self._secret, "[key]") if self._secret else text


class DryRun:
    """A Completer that sends nothing: it counts what would be sent, and answers with a stand-in.

    Args:
        reply: what to answer a request with, of typical length and, where the next request depends on it, form.
        keys: what the completer that it stands for may know a request's completion by.
        prices: dollars per million tokens.
        journal: where completions of earlier runs are looked up, which need not be asked again.
    """

    def __init__(
        self,
        reply: Callable[[Request], str],
        keys: Callable[[Request], Sequence[str]],
        prices: Prices = FREE,
        journal: Journal | None = None,
    ):
        self._reply, self._keys, self._prices, self._journal = reply, keys, prices, journal
        self._known, self._seen = set[str](), set[str]()
        self._typical = self._most = Tokens()

    @property
    def usage(self) -> Usage:
        """What a run would use: estimates, with replies as long as the stand-ins and no retries."""
        return Usage(
            len(self._seen), len(self._known), 0, *self._typical, self._prices.dollars(self._typical), concurrency=0
        )

    @property
    def most_dollars(self) -> float:
        """What it would cost if every reply were as long as it may be."""
        return self._prices.dollars(self._most)

    async def complete(self, request: Request) -> Completion:
        """Count a request, unless it was counted before: a run would not ask it again."""
        keys = self._keys(request)
        key = keys[0]
        if self._journal is not None and (known := self._journal.get(*keys)):
            self._known.add(key)
            return known
        text = self._reply(request)
        prompt, completion = estimate_tokens(request.messages), estimate_tokens([{"content": text}])
        completion = min(completion, request.max_tokens)
        if key not in self._seen:
            self._seen.add(key)
            self._typical = Tokens(self._typical.prompt + prompt, self._typical.completion + completion)
            self._most = Tokens(self._most.prompt + prompt, self._most.completion + request.max_tokens)
        return Completion("ok", text, prompt, completion)


def keys_of(request: Request, model: str, sampling: dict[str, Any], longest_reply: int) -> tuple[str, str]:
    """What a completion is known by in the journal, and what it is known by if it is a reply that was cut off."""
    key = request_key(request, model, sampling)
    return key, _cut_at(key, longest_reply)


def _cut_at(key: str, longest_reply: int) -> str:
    return f"{key} cut off at {longest_reply}"


class _Stopped(RuntimeError):
    """Why a server that has completed requests will complete no more: one line."""


class _Tally:
    """What the attempts of one request have cost, and what went wrong in the last."""

    def __init__(self):
        self.spent = Tokens()
        self.problem = ""


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= REASON_LENGTH else text[:REASON_LENGTH] + "..."


def check_address(base_url: str | None, key: str | None) -> None:
    """Raise ClientError for a base URL or a key that cannot be one."""
    _address(base_url or OPENAI)
    _checked_key(key or "")


def _address(base_url: str) -> str:
    """A base URL as it may be shown: without user, password and query."""
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, host, port = None, None, ""
    if not host or parts.scheme not in ("http", "https"):
        shown = base_url if base_url.isascii() and not set("@?") & set(base_url) else "one with a secret in it"
        raise ClientError(f"found the base URL {shown!r}, expected one like http://localhost:8000/v1: correct it")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path.rstrip('/')}"


def _checked_key(key: str) -> str:
    """The key if it is a secret, "" if it is one of the PLACEHOLDERS or shorter than a secret can be."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ClientError("found a key with a space, a line break or a foreign letter in it: check OPENAI_API_KEY")
    return "" if len(key) < 6 or key.lower() in PLACEHOLDERS else key
