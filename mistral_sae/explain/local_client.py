"""Chat completions of the loaded model itself, where it is an instruct model."""

import asyncio
import itertools
import threading

from mistral_sae.explain.journal import Journal, request_key
from mistral_sae.explain.prompts import fold_system
from mistral_sae.explain.types import Completion, Request
from mistral_sae.files import hash_of
from mistral_sae.model.language_model import LanguageModel, ModelError

MODEL_CONTEXT = 32_768  # positions of Mistral's instruct models from 7B v0.2 on, whose own format does not say so


class LocalClient:
    """Completes requests by an instruct model that is loaded, one at a time, in a thread beside the event loop's.

    The likeliest token is taken each time. A prompt that leaves no room for a reply has the status "overflow", a reply
    that does not end within its max_tokens or the context "truncated". `complete` raises ModelError if the tokenizer
    has no chat format, and UserError if the journal cannot be written.
    """

    def __init__(self, model: LanguageModel, journal: Journal):
        self._model, self._journal, self._turn = model, journal, asyncio.Lock()
        self._context = model.context_length or MODEL_CONTEXT
        self._hash = hash_of(model.name, model.block(model.n_layers - 1).state_dict())  # which any training changes

    def keys(self, request: Request) -> tuple[str]:
        """What the journal knows a request's completion by."""
        return (request_key(request, self._hash, {"context_length": self._context}),)

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
        try:
            ids = self._model.tokenizer.chat(request.messages)
        except ModelError:  # mostly of a format without a system role
            ids = self._model.tokenizer.chat(fold_system(request.messages))
        room = min(request.max_tokens, self._context - len(ids))
        if room < 1:
            return Completion("overflow", f"the prompt has {len(ids):,} of {self._context:,} tokens", len(ids))
        # One token more than is wanted, to see whether the reply ends there
        reply = list(itertools.takewhile(lambda _: not stopped.is_set(), self._model.generate(ids, room + 1)))
        text = self._model.tokenizer.decode(reply[:room])
        return Completion("ok" if len(reply) <= room else "truncated", text, len(ids), min(len(reply), room))
