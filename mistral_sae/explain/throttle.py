"""What holds requests back: a limit on how many are out at once, and a budget."""

import asyncio
import contextlib
import heapq
import itertools
import math
import random
from collections.abc import AsyncIterator
from typing import NamedTuple

FIRST_LIMIT = 8


class BudgetReached(RuntimeError):
    """The next request might cost more than is left: one line. What is in flight goes on to its end."""


class Tokens(NamedTuple):
    """What a request reads and writes."""

    prompt: int = 0
    completion: int = 0


class Prices(NamedTuple):
    """Dollars per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def dollars(self, tokens: Tokens) -> float:
        """What `tokens` cost."""
        return (tokens.prompt * self.prompt + tokens.completion * self.completion) / 1e6


FREE = Prices()


class Limit:
    """How many attempts may be out at once: found by trying, as TCP finds the speed of a line (Jacobson 1988).

    Each success raises `value` by one until the server is overwhelmed for the first time; from then on by one a
    round. Being overwhelmed halves it, once for all the attempts that were out together. A pause holds all of them.
    """

    def __init__(self, most: int, first: int = FIRST_LIMIT):
        self.most = most
        self.value = float(min(first, most))
        self._out = 0
        self._halved: float | None = None
        self._opens = self._eased = self._gap = 0.0  # on the event loop's clock; seconds between starts until `_eased`
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[tuple[float, int, asyncio.Future]] = []
        self._order = itertools.count()

    @contextlib.asynccontextmanager
    async def slot(self, since: float | None) -> AsyncIterator[None]:
        """Wait for room. Who has been at it `since` longest goes first, and whoever begins now (None) last."""
        place = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (float("inf") if since is None else since, next(self._order), place))
        self._admit()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():  # else it was never let in
                self._out -= 1
                self._admit()

    def succeeded(self) -> None:
        """The server answered."""
        self.value = min(self.most, self.value + (1 if self._halved is None else 1 / self.value))
        self._admit()

    def overwhelmed(self, began: float) -> None:
        """The server asked for less, or took too long, in an attempt that `began` then on the event loop's clock."""
        if self._halved is None or began >= self._halved:
            self.value = max(1.0, self.value / 2)
            self._halved = asyncio.get_running_loop().time()

    def pause(self, seconds: float, spread: float) -> None:
        """Let nobody in for `seconds`, and the first ones then not at the same moment but over about `spread` more."""
        opens = asyncio.get_running_loop().time() + seconds
        if opens > self._opens:
            self._gap = spread / self.value
            self._opens, self._eased = opens + self._gap * random.random(), opens + spread

    def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._out < int(self.value):
            if (now := loop.time()) < self._opens:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = loop.call_at(self._opens, self._admit)
                return
            place = heapq.heappop(self._waiting)[-1]
            if not place.done():  # cancelled while it waited
                self._out += 1
                place.set_result(None)
                if now < self._eased:
                    self._opens = now + self._gap * random.uniform(0.0, 2.0)


class Budget:
    """Dollars and tokens that may be spent, of which `tokens_before` and `dollars_before` are gone already.

    An attempt reserves the most that it can cost before it goes out, so that the bounds hold however many are out.
    """

    def __init__(
        self,
        prices: Prices,
        max_dollars: float | None,
        max_tokens: int | None,
        dollars_before: float = 0.0,
        tokens_before: int = 0,
    ):
        self.prices = prices
        self.spent = Tokens()
        self._max_dollars, self._max_tokens = max_dollars, max_tokens
        self._dollars_before, self._tokens_before = dollars_before, tokens_before
        self._reserved: list[Tokens] = []
        self._settled = asyncio.Event()
        self._reached = ""

    @property
    def dollars(self) -> float:
        """Spent by this run."""
        return self.prices.dollars(self.spent)

    async def reserve(self, most: Tokens) -> None:
        """Wait until `most` fits beside what is out.

        Raises:
            BudgetReached: it does not fit with nothing else out, or was raised before.
        """
        while shortage := self._reached or self._shortage(most):
            if self._reached or not self._reserved:
                self._reached = shortage
                raise BudgetReached(shortage)
            await self._settled.wait()
        self._reserved.append(most)

    def settle(self, most: Tokens, spent: Tokens) -> None:
        """Give back what was reserved and note what was spent."""
        self._reserved.remove(most)
        self.spent = Tokens(self.spent.prompt + spent.prompt, self.spent.completion + spent.completion)
        self._settled.set()
        self._settled = asyncio.Event()

    def _shortage(self, most: Tokens) -> str:
        """Why `most` does not fit beside what is out; "" if it does."""
        wanted = [most, *self._reserved]
        dollars, tokens = self._dollars_before + self.dollars, self._tokens_before + sum(self.spent)
        if self._max_dollars is not None and dollars + sum(map(self.prices.dollars, wanted)) > self._max_dollars:
            earlier = f" ({_shown(self._dollars_before)} of them before this run)" if self._dollars_before else ""
            return (
                f"the budget of {_shown(self._max_dollars, 2)} is reached: {_shown(dollars)} spent{earlier}, and the "
                f"next request may cost {_shown(self.prices.dollars(most))}: raise MAX_DOLLARS to go on"
            )
        if self._max_tokens is not None and tokens + sum(map(sum, wanted)) > self._max_tokens:
            earlier = f" ({self._tokens_before:,} of them before this run)" if self._tokens_before else ""
            return (
                f"the budget of {self._max_tokens:,} tokens is reached: {tokens:,} used{earlier}, and the next "
                f"request may use {sum(most):,}: raise MAX_TOKENS to go on"
            )
        return ""


def _shown(dollars: float, places: int = 4) -> str:
    """An amount with at least so many decimal places, and at least two significant digits."""
    return f"${dollars:,.{max(places, 1 - math.floor(math.log10(dollars))) if dollars > 0 else places}f}"
