"""What a server's answer to a chat completion means. OpenAI-compatible servers agree on success, less so on errors."""

import email.utils
import json
import math
import re
import time
from typing import Any, NamedTuple

import openai

from mistral_sae.explain.throttle import Tokens

CHARACTERS_PER_TOKEN = 3.5  # English and code; other scripts have fewer

# Each with the wordings of OpenAI, Azure, Mistral, Gemini, vLLM, llama.cpp, Ollama, LM Studio, TGI, Groq and OpenRouter
OVERFLOW = re.compile(
    r"context[ _-]?(length|size|window)|exceed_context|maximum model length|input length exceeds|prompt is too long"
    r"|prompt contains .* too large|request too large|must have less than \d+ tokens|max_new_tokens. must be <="
    r"|input token(s| count) (.* )?exceed|input is too long|maximum prompt length|max_model_len",
    re.IGNORECASE,
)
CUT_OFF = re.compile(r"could not finish the message because max_tokens", re.IGNORECASE)
FILTERED = re.compile(
    r"content[ _-]?(filter|policy|management policy)|ResponsibleAIPolicy|moderation|flagged|data_inspection",
    re.IGNORECASE,
)
BAD_KEY = re.compile(r"api[ _-]?key.{0,20}(not valid|invalid|missing|incorrect)|invalid.api.key", re.IGNORECASE)
NO_QUOTA = re.compile(
    r"insufficient[ _-](quota|balance|funds|credits)|billing_(hard_limit|not_active)|credit balance is too low",
    re.IGNORECASE,
)
REGION = re.compile(r"(country|region|territory|user location).{0,40}not supported|unsupported_country", re.IGNORECASE)
FORMAT = re.compile(r"response.?format|json.?(schema|object|mode)|structured.output|guided|grammar", re.IGNORECASE)
# Of chat templates, which mostly say it in the words of the model's makers
SYSTEM_ROLE = re.compile(
    r"system.{0,20}\b(role|message|prompt|instruction)|\broles?\b.{0,40}(system|alternate|only|user)"
    r"|only user and assistant",
    re.IGNORECASE,
)
UNKNOWN_MODEL = re.compile(
    r"model_not_found|invalid[ _]model|\bmodel .{0,120}(not found|not exist|unknown|not available)|pinned to",
    re.IGNORECASE | re.DOTALL,
)
TELLING = ("error", "message", "detail", "msg", "code", "type", "param", "loc", "innererror")  # fields of error bodies


class Reply(NamedTuple):
    """The outcome of one attempt."""

    # A request's status, if nothing is left to try: "ok", "refused", "filtered", "overflow", "failed". Else
    # "truncated" (try with more room), "rejected" (a parameter may be at fault), "doubtful" (it may, else "fault"),
    # "busy" (later, and less of it), "fault" (again), "no server" (again, but not for long if there never was one);
    # or what ends the run: "key", "model", "address", "quota", "region", "forbidden" (a key's fault, unless others are
    # answered)
    kind: str
    text: str  # the reply, or the reason in the server's words
    spent: Tokens | None = Tokens()  # None where the server may have charged for a reply that was lost
    wait: float | None = None  # seconds the server asks to wait


def estimate_tokens(messages: list[dict[str, str]]) -> int:
    """About how many tokens a prompt has. An estimate: no tokenizer is asked."""
    return sum(_estimate(message["content"]) for message in messages)


def most_tokens(messages: list[dict[str, str]], schema: dict[str, Any] | None) -> int:
    """A number of tokens that a prompt does not exceed: tokens are no shorter than a byte, templates than 16 tokens."""
    texts = [message["content"] for message in messages] + ([] if schema is None else [str(schema)])
    return sum(len(text.encode("utf-8", "surrogatepass")) + 16 for text in texts)


def read_response(response: object, messages: list[dict[str, str]]) -> Reply:
    """The meaning of what `chat.completions.create` returned, which the openai package does not validate."""
    choices = getattr(response, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        error = getattr(response, "error", None)  # OpenRouter's way of reporting errors
        return Reply("fault", f"a reply without a message{f': {_words(error)}' if error else ''}", None)
    text, refusal = _text(getattr(message, "content", None)), getattr(message, "refusal", None)
    if text is None:
        return Reply("fault", "a reply whose content is not text", None)
    spent = _spent(getattr(response, "usage", None), messages, text)
    finish = getattr(choices[0], "finish_reason", None)
    if finish == "content_filter":
        return Reply("filtered", text or "the provider's content filter withheld the reply", spent)
    if finish == "refusal" or (isinstance(refusal, str) and refusal):
        return Reply("refused", refusal or text, spent)
    if finish == "error":
        return Reply("fault", "a reply that broke off with an error", spent)
    if finish in ("length", "model_length") and not _is_json(text):  # else only white space is missing
        return Reply("truncated", text, spent)
    if not text.strip():
        return Reply("fault", "an empty reply", spent)
    return Reply("ok", text, spent)


def read_error(error: Exception) -> Reply:
    """The meaning of what `chat.completions.create` raised."""
    if isinstance(error, openai.APIStatusError):
        return _read_status(error.status_code, _words(error.body), _wait(error.response.headers))
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if isinstance(error, openai.APIConnectionError):
        if {type(cause).__name__ for cause in causes} & {"ConnectError", "ConnectTimeout"}:
            return Reply("no server", str(causes[-1]) or "no connection")
        if isinstance(error, openai.APITimeoutError):
            return Reply("busy", "no reply in time", None)
        return Reply("fault", f"the connection broke ({type(causes[-1]).__name__})", None)
    return Reply("fault", f"a reply that is no JSON of a chat completion ({type(error).__name__}: {error})", None)


def _read_status(status: int, words: str, wait: float | None) -> Reply:
    # What comes with a 401 may show a part of the key
    text = f"HTTP {status}: {words}" if words and status != 401 else f"HTTP {status}"
    if status == 400 and CUT_OFF.search(words):
        return Reply("truncated", "", None)
    if status == 413 or (status in (400, 422, 429, 500) and OVERFLOW.search(words)):
        kind = "overflow"
    elif status in (400, 403, 422, 451) and FILTERED.search(words):
        kind = "filtered"
    elif status == 402 or (status in (400, 403, 429) and NO_QUOTA.search(words)):
        kind = "quota"
    elif status in (400, 403) and REGION.search(words):
        kind = "region"
    elif status == 401 or (status in (400, 403) and BAD_KEY.search(words)):
        kind = "key"
    elif status == 403:
        kind = "forbidden"
    elif status in (429, 503, 504, 529):
        kind = "busy"
    elif status in (400, 404, 422, 500, 501) and (FORMAT.search(words) or SYSTEM_ROLE.search(words)):
        kind = "doubtful" if status == 500 else "rejected"  # llama.cpp says so of what its template refuses
    elif status in (400, 404) and UNKNOWN_MODEL.search(words):
        kind = "model"
    elif status in (404, 405):
        kind = "address"
    elif status in (400, 422, 501):
        kind = "rejected"
    elif status in (408, 409, 425) or status >= 500:
        kind = "fault"
    else:
        kind = "failed"
    return Reply(kind, text, wait=wait)


def _words(body: object) -> str:
    """What an error body says, without what it repeats of the request."""
    if isinstance(body, dict):
        return " ".join(filter(None, (_words(body[name]) for name in TELLING if name in body)))
    if isinstance(body, list):
        return " ".join(filter(None, map(_words, body)))
    return "" if body is None else str(body)


def _wait(headers: Any) -> float | None:
    """Seconds until the server wants to be asked again: retry-after-ms, or Retry-After in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, IndexError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _text(content: object) -> str | None:
    """The text of a message's content: a string, or a list of parts of which some are text (Mistral's thinking)."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return None


def _is_json(text: str) -> bool:
    """Whether a text is a whole JSON object or list."""
    try:
        return isinstance(json.loads(text, strict=False), dict | list)
    except (ValueError, RecursionError):
        return False


def _spent(usage: object, messages: list[dict[str, str]], text: str) -> Tokens:
    """What the server counted, or where it counted nothing an estimate."""
    prompt, completion = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return Tokens(
        prompt if type(prompt) is int and prompt >= 0 else estimate_tokens(messages),
        completion if type(completion) is int and completion >= 0 else _estimate(text),
    )


def _estimate(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
