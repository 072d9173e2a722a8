"""What a server's response means: a chat completion, or an error in the words of one of many servers."""

import json
import re
from typing import Any, NamedTuple

import httpx2

from mistral_sae.cli import one_line
from mistral_sae.explain.journal import Tokens, estimate_tokens
from mistral_sae.explain.types import Request

MOST_PATIENCE = 600  # seconds; a server that asks to wait longer ends the run

FORMAT = r"response.?format|json.?(schema|object|mode)|structured.output|guided|grammar"
SYSTEM_ROLE = (  # chat templates say it in the words of the model's makers
    r"system.{0,20}\b(role|message|prompt|instruction)|\broles?\b.{0,40}(system|alternate|only|user)|only user and"
)
OVERFLOW = (
    r"context[ _-]?(length|size|window)|exceed_context|max(imum |_)(model|prompt)|must have less than \d+ tokens"
    r"|(prompt|inputs?)\b.{0,60}\b(too (long|large)|exceed)|max_new_tokens. must be <="
)
ERRORS = (  # kind, HTTP statuses, words of OpenAI, Azure, Mistral, vLLM, llama.cpp, Ollama and others; the first counts
    ("truncated", {400}, "could not finish the message because max_tokens"),
    ("overflow", {413}, ""),
    ("overflow", {429}, "request too large"),
    ("overflow", {400, 422, 500}, OVERFLOW),
    ("filtered", {400, 403, 422}, r"content[ _-]?(filter|policy|management)|responsibleai|moderation|flagged|inspect"),
    ("quota", {402}, ""),
    ("quota", {400, 403, 429}, r"insufficient[ _-](quota|balance|funds|credits)|billing_|credit balance is too low"),
    ("key", {401}, ""),
    ("key", {400, 403}, r"api[ _-]?key.{0,20}(not valid|invalid|missing|incorrect)|invalid.api.key"),
    ("forbidden", {403, 451}, ""),
    ("busy", {429, 503, 504, 529}, ""),
    ("rejected", {400, 404, 422, 500, 501}, f"{FORMAT}|{SYSTEM_ROLE}"),
    ("model", {400, 404}, r"model_not_found|invalid[ _]model|\bmodel .*(not found|not exist|unknown|not available)"),
    ("address", {404, 405}, ""),
    ("rejected", {400, 422, 501}, ""),
    ("fault", {408, 409, 425, *range(500, 600)}, ""),
    ("failed", range(1000), ""),
)
STREAM = re.compile(r"\s*(data|event): ")
TELLING = ("error", "message", "detail", "msg", "code", "type", "param", "loc", "innererror")  # fields of error bodies
ANSWERED = frozenset({"ok", "refused", "filtered", "truncated", "looping"})
LOOPS, LOOP_CHARACTERS = 4, 120  # a reply loops if it ends in as many copies of the same, of so many characters in all


class Reply(NamedTuple):
    """What came of one attempt."""

    # One of ANSWERED, "overflow" or "failed", which are final; "rejected" (a part of the request may be at fault);
    # "forbidden"; or one that the client has a rule for; "" before the first
    kind: str = ""
    text: str = ""  # the reply, or the reason in the server's words
    spent: Tokens | None = Tokens()  # None where the server may have charged for a reply that was lost


def read_reply(response: httpx2.Response, request: Request) -> Reply:
    """The meaning of a server's response."""
    body = _body(response)
    if not response.is_success:
        return _read_error(response.status_code, body, response.headers)
    try:
        choice = body["choices"][0]
        message, finish, usage = choice["message"], choice.get("finish_reason"), body.get("usage")
        text, refusal = _text(message.get("content")), str(message.get("refusal") or "")
        thoughts = str(message.get("reasoning") or message.get("reasoning_content") or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        if isinstance(body, dict) and isinstance(body.get("error"), dict):  # OpenRouter reports errors so
            code = body["error"].get("code")
            return _read_error(code if code in range(400, 600) else 502, body, response.headers)._replace(spent=None)
        return Reply("unusable", f"no chat completion but {one_line(response.text)[:80]!r}", None)
    text = text if text.strip() or not _is_json(thoughts) else thoughts
    counted = [usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None for kind in Tokens._fields]
    guessed = [estimate_tokens(*(each["content"] for each in request.messages)), estimate_tokens(text)]
    spent = Tokens(*(n if type(n) is int and n >= 0 else m for n, m in zip(counted, guessed, strict=True)))
    if finish == "content_filter":
        return Reply("filtered", text or "the provider's content filter withheld the reply", spent)
    if finish == "refusal" or refusal:
        return Reply("refused", refusal or text, spent)
    if finish == "error":
        return Reply("fault", "a reply that broke off with an error", spent)
    if finish in ("length", "model_length") and not _is_json(text):  # else only white space is missing
        return Reply("looping" if _loops(text or thoughts) else "truncated", text, spent)
    if not text.strip():
        return Reply("unusable", f"an empty reply after the thoughts {one_line(thoughts)[:80]!r}", spent)
    return Reply("ok", text, spent)


def _read_error(status: int, body: Any, headers: httpx2.Headers) -> Reply:
    words, wait = _words(body), headers.get("retry-after", "")
    kind = next(k for k, statuses, pattern in ERRORS if status in statuses and re.search(f"(?is){pattern}", words))
    if kind == "truncated":
        return Reply(kind, "", None)
    if kind == "busy" and wait.isdecimal() and int(wait) > MOST_PATIENCE:
        return Reply("quota", f"HTTP {status}, for {int(wait):,} s")
    # What comes with a 401 may show a part of the key
    return Reply(kind, f"HTTP {status}: {one_line(words)}" if words and status != 401 else f"HTTP {status}")


def _body(response: httpx2.Response) -> Any:
    """What a response holds: a completion, also one in an envelope or a stream, or something else."""
    try:
        if response.headers.get("content-type", "").startswith("text/event-stream") or STREAM.match(response.text):
            return _joined(response.text)
        body = json.loads(response.content, strict=False)
    except (ValueError, RecursionError, TypeError, AttributeError):
        return response.text
    inside = [each for each in body.values() if isinstance(each, dict)] if isinstance(body, dict) else []
    wrapped = [each for each in inside if "choices" in each]
    return wrapped[0] if len(wrapped) == 1 and "choices" not in body else body


def _joined(stream: str) -> dict[str, Any]:
    """The chat completion whose pieces a server streams, although it is asked not to."""
    events = [line[5:].strip() for line in stream.split("\n") if line.startswith("data:")]
    message, finish, usage = dict[str, str](), None if "[DONE]" in events else "error", None
    for piece in (json.loads(event, strict=False) for event in events if event != "[DONE]"):
        if "error" in piece:
            return piece
        usage = piece.get("usage") or usage
        for choice in (piece.get("choices") or [])[:1]:
            finish = choice.get("finish_reason") or finish
            for name, text in (choice.get("delta") or {}).items():
                message[name] = message.get(name, "") + (text or "")
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def _loops(text: str) -> bool:
    """Whether a text ends in the same again and again, as small models' do."""
    lengths = range(1, len(text) // LOOPS + 1)
    return any(text.endswith(text[-n:] * max(LOOPS, -(-LOOP_CHARACTERS // n))) for n in lengths)


def _words(body: Any) -> str:
    """What an error body says, without what it repeats of the request."""
    if isinstance(body, dict):
        body = [body[name] for name in TELLING if name in body]
    return " ".join(filter(None, map(_words, body))) if isinstance(body, list) else str("" if body is None else body)


def _text(content: Any) -> str:
    """A message's content: a string, or a list of parts of which some are text (Mistral's thinking); else TypeError."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    return "" + (content or "")


def _is_json(text: str) -> bool:
    """Whether a text is a whole JSON object or list."""
    try:
        return isinstance(json.loads(text, strict=False), dict | list)
    except (ValueError, RecursionError):
        return False
