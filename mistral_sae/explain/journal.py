"""The replies of a RUN_DIR, kept so that none is asked for twice, and what requests cost."""

import asyncio
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mistral_sae.cli import UserError
from mistral_sae.explain.types import STATUSES, Completion, Request, Status
from mistral_sae.schema import Schema, Total, lines, parse

CHARACTERS_PER_TOKEN = 3.5  # English and code; other scripts have fewer


class Tokens(NamedTuple):
    """What requests read and write."""

    prompt: int = 0
    completion: int = 0

    def plus(self, other: "Tokens") -> "Tokens":
        """The sum of both."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)


class Prices(NamedTuple):
    """Dollars per million tokens."""

    prompt: float
    completion: float


def estimate_tokens(*texts: str) -> int:
    """About how many tokens some texts have, without a tokenizer."""
    return sum(math.ceil(len(text) / CHARACTERS_PER_TOKEN) for text in texts)


def most_tokens(request: Request, reply: int) -> Tokens:
    """The most a request can use: tokens are no shorter than a byte, what a chat format adds than 16 tokens a text."""
    texts = [message["content"] for message in request.messages] + [str(request.schema or "")]
    return Tokens(sum(len(text.encode("utf-8", "surrogatepass")) + 16 for text in texts), reply)


def request_key(request: Request, model: str, sampling: dict[str, Any]) -> str:
    """SHA-256 of all that a completion depends on, so neither the server's address nor its key."""
    return hashlib.sha256(json.dumps([*request, model, sampling], sort_keys=True).encode()).hexdigest()


class _Line(Schema):
    """A line of the journal."""

    key: str
    status: Status
    text: str
    prompt_tokens: Total
    completion_tokens: Total
    dollars: Annotated[float, Field(ge=0)]


class Journal:
    """Completions by `request_key`, in a file of one JSON object a line to which lines are only added.

    A line is on the disk before anyone sees its completion; a torn last line is removed at opening. The file is made
    with the first line. Only one process may have it open: lock the RUN_DIR.

    Attributes:
        tokens: of all lines, those of failed requests too.
        dollars: what they cost.
        unpriced: those of `tokens` that cost nothing, since prices were not known when they were used.

    Raises UserError where the file holds something else.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.tokens, self.dollars, self.unpriced = 0, 0.0, 0
        self._completions: dict[str, Completion] = {}
        self._size = 0
        advice = "remove that line, and its request is asked again"
        for where, line in lines(self.path, advice) if self.path.exists() else []:
            if not line.endswith(b"\n"):  # which is written last
                os.truncate(self.path, self._size)
                break
            found: _Line = parse(_Line, line, where, advice)
            tokens = found.prompt_tokens, found.completion_tokens
            self._take(found.key, Completion(found.status, found.text, *tokens), found.dollars)
            self._size += len(line)

    def __len__(self) -> int:
        """Requests that need not be asked again."""
        return len(self._completions)

    def get(self, *keys: str) -> Completion | None:
        """The final completion of the first of these keys that has one."""
        return next((self._completions[key] for key in keys if key in self._completions), None)

    def append(self, key: str, completion: Completion, dollars: float = 0.0) -> None:
        """Write a completion down, and what its attempts cost. If that fails, a UserError: the file is as it was."""
        line = json.dumps({"key": key, **completion._asdict(), "dollars": dollars}).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise UserError(
                f"could not write {self.path} ({error.strerror}), expected room for a line: start again with some"
            ) from None
        self._size += len(line)
        self._take(key, completion, dollars)

    def _take(self, key: str, completion: Completion, dollars: float) -> None:
        if not STATUSES[completion.status].ask_again:
            self._completions.setdefault(key, completion)
        tokens = completion.prompt_tokens + completion.completion_tokens
        self.tokens += tokens
        self.dollars += dollars
        self.unpriced += 0 if dollars else tokens


class Budget:
    """Dollars and tokens that all runs with a journal may spend together, what is in flight included.

    Without prices dollars are 0. A bound of None is no bound.
    """

    def __init__(
        self,
        journal: Journal,
        prices: Prices | None = None,
        max_dollars: float | None = None,
        max_tokens: int | None = None,
    ):
        self.prices, self.spent = prices, Tokens()  # of this run
        # Constant, bound, spent by earlier runs, what tokens come to, how an amount is shown
        self._bounds: list[tuple[Any, ...]] = [
            ("MAX_DOLLARS", max_dollars, journal.dollars, self.dollars, _shown),
            ("MAX_API_TOKENS", max_tokens, journal.tokens, sum, "{:,} tokens".format),
        ]
        self._in_flight: list[Tokens] = []
        self._settled = asyncio.Event()
        self._reached = ""

    def dollars(self, tokens: Tokens) -> float:
        """What tokens cost."""
        prompt, completion = self.prices or (0.0, 0.0)
        return (tokens.prompt * prompt + tokens.completion * completion) / 1e6

    def cost(self, tokens: Tokens, more: str = "") -> str:
        """What tokens cost and at which prices, to end a line with; "" where prices are not known."""
        if self.prices is None:
            return ""
        prompt, completion = self.prices
        return f": ${self.dollars(tokens):,.2f}{more} at ${prompt:g} and ${completion:g} a million"

    def shortage(self, most: Tokens) -> str:
        """Why what may use `most` does not fit beside what is in flight, in one line; "" if it does."""
        for name, bound, before, count, shown in self._bounds:
            used = before + count(self.spent)
            if bound is not None and used + sum(map(count, [most, *self._in_flight])) > bound:
                earlier = f" ({shown(before)} of them before this run)" if before else ""
                return (
                    f"the budget of {shown(bound)} is reached: {shown(used)} spent{earlier}, and the next request may "
                    f"take {shown(count(most))}: raise {name} to go on"
                )
        return ""

    async def reserve(self, most: Tokens) -> str:
        """Wait until `most` fits beside what is in flight; the reason if nothing will any more, else ""."""
        while not self._reached and (shortage := self.shortage(most)):
            if self._in_flight:
                await self._settled.wait()
            else:
                self._reached = shortage
        if not self._reached:
            self._in_flight.append(most)
        return self._reached

    def settle(self, most: Tokens, spent: Tokens) -> None:
        """Note what was spent of what was reserved."""
        self._in_flight.remove(most)
        self.spent = self.spent.plus(spent)
        self._settled.set()
        self._settled = asyncio.Event()


def _shown(dollars: float) -> str:
    """An amount with at least two decimal places and two significant digits."""
    return f"${dollars:,.{max(2, 1 - math.floor(math.log10(dollars))) if dollars > 0 else 2}f}"


class DryRun:
    """A Completer that sends nothing: it counts what would be sent, and answers with `reply` of the request.

    `keys`, `journal` and `budget` are those of the completer that it stands for.
    """

    def __init__(
        self,
        reply: Callable[[Request], str],
        keys: Callable[[Request], Sequence[str]],
        journal: Journal,
        budget: Budget,
    ):
        self._reply, self._keys, self._journal, self._budget = reply, keys, journal, budget
        self._known, self._asked = set[str](), set[str]()
        self.typical = self.most = Tokens()  # with replies as long as the stand-ins; as long as they may be

    async def complete(self, request: Request) -> Completion:
        """Count a request, unless it was counted before: a run would not ask it again."""
        keys = self._keys(request)
        if known := self._journal.get(*keys):
            self._known.add(keys[0])
            return known
        text = self._reply(request)
        prompt = estimate_tokens(*(message["content"] for message in request.messages))
        tokens = Tokens(prompt, min(estimate_tokens(text), request.max_tokens))
        if keys[0] not in self._asked:
            self._asked.add(keys[0])
            self.typical = self.typical.plus(tokens)
            self.most = self.most.plus(Tokens(prompt, request.max_tokens))
        return Completion("ok", text, *tokens)

    @property
    def summary(self) -> str:
        """What a run would ask and cost without retries, in one line."""
        known = f", and {len(self._known):,} that are answered already" if self._known else ""
        most = f", without retries at most ${self._budget.dollars(self.most):,.2f},"
        ends = "; the budget ends before that" if self._asked and self._budget.shortage(self.typical) else ""
        return (
            f"{len(self._asked):,} requests{known}, about {self.typical.prompt:,} tokens to read and "
            f"{self.typical.completion:,} to write{self._budget.cost(self.typical, most)}{ends}"
        )
