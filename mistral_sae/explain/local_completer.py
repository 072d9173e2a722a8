"""The loaded model as a `records.Completer`: an instruct model explains its own features, without a network."""

import asyncio
import itertools
import threading

from mistral_sae.explain.journal import Journal, request_key
from mistral_sae.explain.prompts import fold_system
from mistral_sae.explain.types import Completion, Request
from mistral_sae.files import hash_of
from mistral_sae.model.language_model import LanguageModel, ModelError

CONTEXT = 32_768  # positions of Mistral's instruct models, whose own format does not say so, from 7B v0.2 on


class LocalCompleter:
    """Completes chats with a model, one at a time, in a thread beside the event loop's.

    The likeliest token is taken each time, so that a request has the same completion whenever it is asked: the second
    time, and in a run that goes on after one that was stopped, it comes from the journal. A prompt
    that leaves no room for a reply has the status "overflow", a reply that does not end within the request's max_tokens
    or the rest of the context "truncated".

    Args:
        lm: the whole model.
        journal: where completions are looked up and written down.
        context_length: tokens of prompt and reply together, at most; None is what the model was made for.

    Raises:
        ModelError: from `complete`, if the tokenizer has no chat format: no request can succeed then.
        JournalError: from `complete`, if the journal cannot be written.
    """

    def __init__(self, lm: LanguageModel, journal: Journal, context_length: int | None = None):
        self._lm, self._journal = lm, journal
        self._context_length = context_length or lm.context_length or CONTEXT
        self._model = hash_of(lm.name, lm.block(lm.n_layers - 1).state_dict())  # any training changes its last layer
        self._turn = asyncio.Lock()
        self._has_system_role = True

    def keys(self, request: Request) -> tuple[str]:
        """What the journal knows a request's completion by."""
        return (request_key(request, self._model, {"context_length": self._context_length}),)

    async def complete(self, request: Request) -> Completion:
        """The completion of a request, after those that were asked for before it."""
        (key,) = self.keys(request)
        async with self._turn:
            if known := self._journal.get(key):
                return known
            stopped = threading.Event()
            try:
                completion = await asyncio.to_thread(self._complete, request, stopped)
            finally:
                stopped.set()  # if this was cancelled, the thread would go on to the end of the reply
            self._journal.append(key, completion)
            return completion

    def _complete(self, request: Request, stopped: threading.Event) -> Completion:
        ids = self._chat(request.messages)
        room = min(request.max_tokens, self._context_length - len(ids))
        if room < 1:
            return Completion("overflow", f"the prompt has {len(ids):,} of {self._context_length:,} tokens", len(ids))
        # One token more than is wanted, to see whether the reply ends there
        tokens = itertools.takewhile(lambda _: not stopped.is_set(), self._lm.generate(ids, room + 1))
        reply = list(tokens)
        text = self._lm.tokenizer.decode(reply[:room])
        return Completion("ok" if len(reply) <= room else "truncated", text, len(ids), min(len(reply), room))

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat; where the format has no system role, its text goes into the first message."""
        if self._has_system_role:
            try:
                return self._lm.tokenizer.chat(messages)
            except ModelError:
                self._has_system_role = False
        return self._lm.tokenizer.chat(fold_system(messages))
