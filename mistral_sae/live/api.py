"""OpenAI's completions of the steered model: what their clients send and read, with `steer` beside it.

client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
steer = {"features": {"6581": 1.5}, "method": "clamp"}
client.completions.create(model="", prompt="def load", extra_body={"steer": steer})
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from mistral_sae.cli import UserError
from mistral_sae.live import asked
from mistral_sae.live.batches import Growing, grow, read
from mistral_sae.live.known import Known
from mistral_sae.model.language_model import Row
from mistral_sae.steer.chat import prompt_of

DEFAULT_TOKENS, DEFAULT_REPLY = 16, 1024  # of a completion, as OpenAI has it, and of a reply, where there is room


class Answer:
    """The texts that answer a request, `n` of each prompt. Raises UserError for what cannot be answered.

    Prompts may come with a BOS or without; it is put before those that have none.
    """

    def __init__(self, known: Known, wanted: asked.Sampled, sent: Sequence[list[int]], max_tokens: int):
        bos = [known.subject.model.tokenizer.bos_id]
        prompts = [ids if ids[:1] == bos else bos + ids for ids in sent]
        for ids in prompts:
            known.check_length(len(ids), max_tokens)
        self.known, self.wanted, self.sent, self.prompts = known, wanted, sent, prompts
        self.model, self.is_chat = known.subject.model, isinstance(wanted, asked.Chat)
        self.edit = wanted.steer.edit()
        self.edit.in_units_of_steer(known.subject)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"cmpl-{secrets.token_hex(8)}", "object": kind, "created": int(time.time())}
        self.head["model"] = known.name
        seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
        temperature = 1.0 if wanted.temperature is None else wanted.temperature
        rows = [Row.of(ids, temperature, seed + i) for ids in prompts for i in range(wanted.n or 1)]
        is_reply = self.is_chat and known.is_instruct
        self.texts = [Growing(self.model.tokenizer, row, max_tokens, wanted.stops, is_reply) for row in rows]

    def chunks(self) -> Iterator[list[dict[str, Any]] | None]:
        """What a stream sends, a step at a time."""
        head = self.head | ({"object": "chat.completion.chunk"} if self.is_chat else {})
        for pieces in grow(self.known, self.texts, self.edit):
            shown = [(i, piece) for i, piece in pieces or () if piece or self.texts[i].finish]
            choices = (self._choice(i, piece, self.texts[i].finish, "delta") for i, piece in shown)
            yield [head | {"choices": [choice]} for choice in choices] or None

    def whole(self) -> Iterator[dict[str, Any]]:
        """The answer in one, as the last item; those before are its steps."""
        for _ in grow(self.known, self.texts, self.edit):
            yield {}
        choices = [self._choice(i, "".join(text.pieces), text.finish, "message") for i, text in enumerate(self.texts)]
        if isinstance(wanted := self.wanted, asked.Completion):
            for _ in read(self.known, self.texts, self.edit) if wanted.logprobs is not None else ():
                yield {}
            for choice, text in zip(choices, self.texts, strict=True):
                number = choice["index"] // (wanted.n or 1)
                if wanted.echo:
                    choice["text"] = self.model.tokenizer.decode(self.sent[number]) + choice["text"]
                if wanted.logprobs is not None:
                    shown = len(text.ids) + (len(self.sent[number]) if wanted.echo else 0)
                    choice["logprobs"] = self._log_probabilities(text, shown, wanted.logprobs)
        given, written = sum(map(len, self.prompts)), sum(len(text.ids) for text in self.texts)
        usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
        yield self.head | {"choices": choices, "usage": usage}

    def _choice(self, index: int, text: str, finish: str | None, name: str) -> dict[str, Any]:
        content = {name: {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": index, "finish_reason": finish, "logprobs": None, **content}

    def _log_probabilities(self, text: Growing, shown: int, top: int) -> dict[str, Any]:
        """Of the last tokens, so many, the log-probability of each and those of the likeliest there; None for a BOS."""
        strings, n = self.model.tokenizer.strings, max(1, top)
        likeliest = [{strings([id])[0]: by for by, id in list(zip(*each, strict=True))[:n]} for each in text.likeliest]
        ids = [*text.prompt, *text.ids]
        first = len(ids) - shown
        tokens = strings(ids)[first:]
        return {
            "tokens": tokens,
            "token_logprobs": [None, *text.log_probabilities][first:],
            "top_logprobs": [None, *likeliest][first:],
            "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
        }


def completion(known: Known, wanted: asked.Completion) -> Answer:
    """The answer to /v1/completions."""
    if wanted.stream and (wanted.echo or wanted.logprobs is not None):
        raise UserError("found stream with echo or logprobs: expected one or the other")
    max_tokens = DEFAULT_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    return Answer(known, wanted, wanted.prompts(known.subject.model), max_tokens)


def chat(known: Known, wanted: asked.Chat) -> Answer:
    """The answer to /v1/chat/completions."""
    messages = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in wanted.messages]
    ids = prompt_of(known.subject.model, messages, known.is_instruct)
    room = max(1, min(DEFAULT_REPLY, known.most_tokens - len(ids)))
    return Answer(known, wanted, [ids], wanted.max_completion_tokens or wanted.max_tokens or room)
