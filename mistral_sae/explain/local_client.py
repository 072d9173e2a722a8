"""Chat completions of the loaded model itself, where it is an instruct model."""

import asyncio

from mistral_sae.explain.journal import Journal, request_key
from mistral_sae.explain.prompts import fold_system
from mistral_sae.explain.types import Completion, Request
from mistral_sae.files import hash_of
from mistral_sae.model.language_model import LanguageModel, ModelError

MODEL_CONTEXT = 32_768  # positions of Mistral's instruct models from 7B v0.2 on, whose own format does not say so


class LocalClient:
    """Completes requests by an instruct model that is loaded, one at a time.

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
            known = self._journal.get(key)
            if known is None:
                known = await self._reply(request)
                self._journal.append(key, known)
            return known

    async def _reply(self, request: Request) -> Completion:
        try:
            ids = self._model.tokenizer.chat(request.messages)
        except ModelError:  # mostly of a format without a system role
            ids = self._model.tokenizer.chat(fold_system(request.messages))
        room = min(request.max_tokens, self._context - len(ids))
        if room < 1:
            return Completion("overflow", f"the prompt has {len(ids):,} of {self._context:,} tokens", len(ids))
        reply = []
        for token in self._model.generate(ids, room + 1):  # one more than is wanted, to see whether it ends there
            reply.append(token)
            await asyncio.sleep(0)  # so that Ctrl-C ends it here
        text = self._model.tokenizer.decode(reply[:room])
        return Completion("ok" if len(reply) <= room else "truncated", text, len(ids), min(len(reply), room))
