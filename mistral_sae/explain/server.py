"""A server that completes chats: how it is asked, and what becomes of a request by what it replies."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mistral_sae.cli import UserError, one_line
from mistral_sae.explain.journal import request_key
from mistral_sae.explain.types import Request

OPENAI = "https://api.openai.com/v1"


class Then(NamedTuple):
    """How often a request is sent whose replies are of a kind, and what follows."""

    attempts: int  # that may have such a reply; `Server.attempts` are all that it has
    follows: str  # "end" the run, "pause" and ask again until the deadline, or the status "failed"


class Rule(NamedTuple):
    """What becomes of a request whose replies are of a kind, and what is said where it ends the run."""

    at_first: Then  # while the server has answered no request, so that what is wrong may be wrong with all of them
    later: Then
    words: str = ""  # "the server at ..."


ALL = 1000
END, PAUSE, FAIL, FINAL = Then(1, "end"), Then(ALL, "pause"), Then(ALL, "failed"), Then(1, "")
RULES = {
    "key": Rule(END, END, "wants a valid key ({words}): check OPENAI_API_KEY"),
    "quota": Rule(END, END, "has no quota left for this key ({words}): add credit, or wait, and start again to go on"),
    # Later these two are a balancer's, that finds another server the next time
    "model": Rule(END, FAIL, "has no model {model!r} ({words}): correct OPENAI_MODEL, or load the model there"),
    "address": Rule(
        END, FAIL,
        "has no chat completions for model {model!r} ({words}): check OPENAI_BASE_URL, which mostly ends in /v1",
    ),
    "no server": Rule(
        Then(3, "end"), PAUSE, "cannot be reached ({words}): start it, or correct OPENAI_BASE_URL"
    ),
    "unusable": Rule(  # whose replies may be paid for
        Then(2, "end"), Then(2, "failed"),
        "sends no chat completion with a text ({words}): check OPENAI_BASE_URL, and SAMPLING of a model that only "
        "thinks",
    ),
    "late": Rule(FAIL, FAIL, "does not answer ({words}): look whether it still runs, and start again to go on"),
    "fault": Rule(FAIL, FAIL, "fails ({words}): look at what it logs, and start again to go on"),
    "busy": Rule(PAUSE, PAUSE),
}  # fmt: skip

NOTES = {  # what would help, by what was the matter
    "room": "replies did not fit into {longest:,} tokens: raise MAX_REPLY_TOKENS, or have a model that thinks do less "
    "of it (SAMPLING)",
    "loops": "replies repeat the same until they are cut off, which more room does not change: the model is too small "
    "for this, or wants another SAMPLING",
    "prompts": "the server read only {read:,} of about {sent:,} tokens of a prompt: raise its context length (Ollama: "
    "OLLAMA_CONTEXT_LENGTH)",
    "slow": "{times:,} attempts had {text}: raise REQUEST_TIMEOUT, or lower CONCURRENCY for a server that answers one "
    "after the other",
    "part": "the server does not take {part}: asking {instead}",
}
INSTEAD = {"max_tokens": "with max_completion_tokens", "json_schema": "for json_object", "json_object": "for text"}


def then(kind: str, served: bool) -> Then:
    """Return what becomes of a request after a reply of this kind; `served`: whether any request was answered."""
    rule = RULES.get(kind, Rule(FINAL, FINAL))
    return rule.later if served else rule.at_first


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server, and how to ask it. Raises UserError for a base URL or a key that cannot be one."""

    model: str  # the server's name for it
    base_url: str | None = None  # mostly ends in /v1; None for OpenAI's
    key: str | None = field(default=None, repr=False)  # None for a server that wants none
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})  # more fields of a request's body
    concurrency: int = 32  # requests at once, at most
    timeout: float = 120.0  # seconds an attempt may take, however slowly it trickles in
    deadline: float = 600.0  # seconds a request may take with all its attempts, while the server answers no other
    attempts: int = 6  # of a request that fails; a server that is busy or away is asked until the deadline
    longest_reply: int = 4096  # tokens; up to these, the max_tokens of a truncated reply are doubled

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-~]*", self.key or ""):
            raise UserError("found a key with a space, a line break or a foreign letter in it: check OPENAI_API_KEY")
        if not re.fullmatch(r"https?://([^/@]*@)?(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?([/?].*)?", self.base_url or OPENAI):
            # It is not shown, as there may be a secret in it
            raise UserError("found the base URL of no server, expected one like http://localhost:8000/v1: correct it")

    @property
    def address(self) -> str:
        """The base URL as it may be shown: without user, password and query."""
        parts = urlsplit(self.base_url or OPENAI)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def keys(self, request: Request) -> tuple[str, str]:
        """What the journal knows a request's completion by, and what it knows a reply by that stayed cut off."""
        key = request_key(request, self.model, self.sampling)
        return key, f"{key} cut off at {self.longest_reply}"

    def without_key(self, text: str) -> str:
        """A text of the server's without the key, which some servers repeat; "ollama" and the like are no secrets."""
        return text.replace(self.key, "[key]") if self.key and len(self.key) > 6 else text

    def ending(self, kind: str, words: str) -> str:
        """Why a reply of this kind ends the run, in one line with the server's words."""
        words = one_line(self.without_key(words))
        return f"the server at {self.address} {RULES[kind].words.format(model=self.model, words=words)}"
