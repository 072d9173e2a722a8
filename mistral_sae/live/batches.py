"""Texts that are asked for, made in batches whoever asks: as they grow by tokens, and as they are read.

Shapes: B texts, T positions, V vocabulary.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from mistral_sae.live import asked
from mistral_sae.live.known import Known
from mistral_sae.model.language_model import LanguageModel, Row
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.steer.steering import Edit
from mistral_sae.steer.sweep import settings_read_at_once

Finish = Literal["stop", "length"]
ROWS = 16  # texts of a batch at most, as many as one request can have of a prompt
AGAIN = 32  # tokens that are read in about the time of a step of a batch: on two cores 50, on a GPU more


class Growing:
    """A text that grows by tokens until its end: the EOS, a stop sequence, or the length that was asked for.

    A reply begins without the space that sentencepiece puts before a text.

    Attributes:
        prompt: the token ids that it continues.
        ids: its own so far.
        pieces: what there was to show after each step.
        finish: why it ended; None while it grows.
        batch: what it is made in; None before its first token and after its last.
        log_probabilities, likeliest: what `read` found, of each token but the first.
    """

    def __init__(
        self, tokenizer: Tokenizer, row: Row, max_tokens: int, stops: Sequence[str] = (), is_reply: bool = False
    ):
        self.prompt, self.ids, self.pieces, self._taken = [*row.ids], list[int](), list[str](), 0
        self.finish: Finish | None = None
        self.batch: Batch | None = None
        self.log_probabilities, self.likeliest = list[float](), list[tuple[list[float], list[int]]]()
        self._row, self._max_tokens, self._drops_space = row, max_tokens, is_reply
        self._tokenizer, self._stops, self._held = tokenizer, [stop for stop in stops if stop], ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if not max_tokens:
            self.end("length")

    @property
    def row(self) -> Row:
        """What `next_tokens` is to go on with."""
        return self._row._replace(ids=[*self.prompt, *self.ids])

    @property
    def left(self) -> int:
        """How many tokens it can grow by."""
        return self._max_tokens - len(self.ids)

    @property
    def has_new(self) -> bool:
        """Whether there are pieces that were not taken."""
        return self._taken < len(self.pieces)

    def take(self) -> str:
        """The pieces that came since the last time."""
        new, self._taken = self.pieces[self._taken :], len(self.pieces)
        return "".join(new)

    def add(self, id: int) -> None:
        """Grow by a token; of what it shows, what may become a stop sequence is held back."""
        if self.finish:
            return
        if id == self._tokenizer.eos_id:
            self.end("stop")
            return
        self.ids.append(id)
        self._held += self._decoder.decode(self._tokenizer.token_bytes(id))
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        if ends:
            self._held = self._held[: min(ends)]
            self._show(len(self._held), "stop")
        elif not self.left:
            self.end("length")
        else:
            self._show(len(self._held) - max(begun, default=0))

    def end(self, finish: Finish) -> None:
        """Show what was held back, and grow no more."""
        if not self.finish:
            self._held += self._decoder.decode(b"", final=True)
            self._show(len(self._held), finish)

    def _show(self, count: int, finish: Finish | None = None) -> None:
        shown, self._held = self._held[:count], self._held[count:]
        if self._drops_space and (shown := shown.lstrip(" ")):
            self._drops_space = False
        self.pieces.append(shown)
        if finish:
            self.finish, self.batch = finish, None  # its KV cache is freed with the last of its texts


class Batch:
    """Texts that are made together under one edit, a token of each at a step."""

    def __init__(self, model: LanguageModel, texts: Sequence[Growing], context: Callable[[], AbstractContextManager]):
        self.texts, self._context = texts, context
        self._steps = model.next_tokens([text.row for text in texts], max(text.left for text in texts))

    def step(self) -> None:
        """Make a token more of each text. The edit is entered anew, as other jobs run between two steps."""
        with self._context():
            ids = next(self._steps, None)
        for i, text in enumerate(self.texts):
            if ids is None:  # the EOS of those that are left
                text.end("stop")
            else:
                text.add(ids[i])


def grow(known: Known, texts: Sequence[Growing], edit: Edit) -> Iterator[list[tuple[int, str]] | None]:
    """The new pieces of texts with their places, a step at a time: a job of the engine.

    Texts with the same edit, of this job and of others, are made in one batch, of at most ROWS.
    """
    known.waiting.update({text: edit for text in texts if not text.finish})
    try:
        yield None  # those who ask at the same time wait, too
        while any(text.has_new or not text.finish for text in texts):
            while not any(text.has_new for text in texts):
                _advance(known, next(text for text in texts if not text.finish), edit)
            yield [(i, text.take()) for i, text in enumerate(texts) if text.has_new]
    finally:
        for text in texts:
            known.waiting.pop(text, None)
            text.end("stop")


def _advance(known: Known, text: Growing, edit: Edit) -> None:
    """Make a token more of a text and of those in its batch, or let each be made alone where that fails."""

    def begin(some: Sequence[Growing]) -> Batch:
        longest = max(len(each.prompt) for each in some)  # where the generated tokens of all begin
        batch = Batch(known.subject.model, some, lambda: edit.context(known.subject, longest))
        for each in some:
            each.batch = batch
        return batch

    batch = text.batch or begin(_together(known, text, edit))
    try:
        batch.step()
    except Exception:  # the memory for all of them, or the numbers of one
        if len(batch.texts) == 1:
            raise
        for each in batch.texts:
            known.waiting.pop(each, None)  # nobody joins it
            if not each.finish:
                begin([each])


def _together(known: Known, text: Growing, edit: Edit) -> list[Growing]:
    """A text, those that wait for the same edit, and those at work under it, where that costs less than it spares.

    It costs a step that reads all their tokens again, and spares one of two steps from then on. Those of which only
    generated tokens are edited cannot be joined at work, as these begin at several positions then.
    """
    alike = [each for each in _alike(known, text) if not each.finish]
    some = [each for each in alike if each.batch is None][:ROWS]
    for batch in dict.fromkeys(each.batch for each in alike if each.batch):
        joined = [*some, *(each for each in batch.texts if not each.finish)]
        tokens = len(joined) * max(len(each.row.ids) for each in joined)
        spared = min(text.left, max(each.left for each in joined[len(some) :]))
        if len(joined) <= ROWS and tokens <= AGAIN * spared and not edit.generated_only:
            some = joined
    return some


def _alike(known: Known, text: Growing) -> list[Growing]:
    """A text and the others that wait for the same."""
    wanted = known.waiting[text]
    return [text, *(each for each, theirs in known.waiting.items() if theirs == wanted and each is not text)]


def read(known: Known, texts: Sequence[Growing], edit: Edit) -> Iterator[None]:
    """Give each text, with its prompt, its log-probabilities and the likeliest tokens: a job as `grow`."""
    known.waiting.update({text: (edit, len(text.prompt) if edit.generated_only else 1) for text in texts})
    try:
        yield
        while some := [text for text in texts if text in known.waiting]:
            alike = _alike(known, some[0])[:ROWS]
            longest = max(len(each.row.ids) for each in alike)
            try:
                _read(known, alike[: settings_read_at_once(1, longest, known.subject.model.vocab_size)], edit)
            except Exception:  # the memory for all of them
                _read(known, alike[:1], edit)
            yield
    finally:
        for text in texts:
            known.waiting.pop(text, None)


@torch.no_grad()
def _read(known: Known, texts: Sequence[Growing], edit: Edit) -> None:
    """Read texts that an edit begins in alike, in one forward, padded on the right, which nothing sees."""
    model, rows = known.subject.model, [torch.tensor(text.row.ids) for text in texts]
    with edit.context(known.subject, len(texts[0].prompt)):
        log_BTV = model.log_probabilities(pad_sequence(rows, True, model.tokenizer.eos_id)).cpu()
    for text, row_T, log_TV in zip(texts, rows, log_BTV, strict=True):
        log_TV = log_TV[: len(row_T) - 1]
        values, ids = log_TV.topk(min(asked.LIKELIEST, log_TV.shape[1]), dim=1)
        text.log_probabilities = log_TV.gather(1, row_T[1:, None]).squeeze(1).tolist()
        text.likeliest = list(zip(values.tolist(), ids.tolist(), strict=True))
        known.waiting.pop(text, None)
