"""Texts as they grow: tokens of a model under an edit, a step at a time, as pieces of text that can be shown.

Shapes: T positions, S steered features, D model width.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.data.activations import residuals_of
from mistral_sae.live import asked
from mistral_sae.live.engine import AT_ONCE
from mistral_sae.live.known import Known
from mistral_sae.live.looking import verdict_of
from mistral_sae.model.language_model import LanguageModel, Row
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.steer import sweep
from mistral_sae.steer.search import TEXT_TOKENS
from mistral_sae.steer.steering import Edit, Subject

Finish = Literal["stop", "length"]


class Growing:
    """A text that grows by tokens until its end: the EOS, a stop sequence, or the length that was asked for.

    A reply begins without the space that sentencepiece puts before a text.

    Attributes:
        prompt: the token ids that it continues.
        ids: its own so far.
        pieces: what there was to show after each step.
        finish: why it ended; None while it grows.
        batch: what it is made in; None before its first token and after its last.
    """

    def __init__(
        self, tokenizer: Tokenizer, row: Row, max_tokens: int, stops: Sequence[str] = (), is_reply: bool = False
    ):
        self.prompt, self.ids, self.pieces, self._taken = row.ids, list[int](), list[str](), 0
        self.finish: Finish | None = None
        self.batch: Batch | None = None
        self._row, self._max_tokens, self._drops_space = row, max_tokens, is_reply
        self._tokenizer, self._stops, self._held = tokenizer, [stop for stop in stops if stop], ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if not max_tokens:
            self.end("length")

    @property
    def row(self) -> Row:
        """What is to go on."""
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

    Texts that wait for the same edit, of this job and of others, are made in one batch, of at most AT_ONCE.
    """
    known.waiting.update(dict.fromkeys(texts, edit))
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
            known.waiting.pop(each, None)
            each.batch = batch
        return batch

    if (batch := text.batch) is None:
        others = [each for each, theirs in known.waiting.items() if theirs == edit and each is not text]
        batch = begin([text, *others][:AT_ONCE])
    try:
        batch.step()
    except Exception:  # the memory for all of them, or the numbers of one
        if len(batch.texts) == 1:
            raise
        for each in batch.texts:
            if not each.finish:
                begin([each])


# ---- side by side ----


def write(known: Known, wanted: asked.Writing) -> Iterator[dict[str, Any] | None]:
    """Pieces of the model's own text, the steered one and a rival's, in one batch as in demo.py; then their figures.

    And the verdict on features that were to show: whether a reader sees more of them than in the model's own text.
    """
    subject, edit, ids = known.subject, wanted.steer.edit(), known.subject.model.encode(wanted.prompt)
    known.check_length(len(ids), wanted.max_tokens)
    edit.in_units_of_steer(subject)
    rival_D = difference_of_means(known, wanted.rival) if wanted.rival else None
    names = ["own", *(["steered"] if edit.coefficients else []), *(["rival"] if wanted.rival else [])]
    rows = len(names)

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            if edit.coefficients:
                stack.enter_context(edit.alone_in(1, rows).context(subject, len(ids)))
            if wanted.rival and rival_D is not None:
                # A coefficient of any feature, since it is not its decoder row that is added
                added = Edit({0: wanted.rival.strength}, "add", edit.generated_only).alone_in(rows - 1, rows)
                stack.enter_context(added.context(subject, len(ids), rival_D[None]))
            yield

    starts = [Row.of(ids, wanted.temperature, wanted.seed) for _ in names]
    texts = [Growing(subject.model.tokenizer, row, wanted.max_tokens, wanted.stop) for row in starts]
    batch = Batch(subject.model, texts, context)
    while not all(text.finish for text in texts):
        batch.step()
        yield {"pieces": {name: text.take() for name, text in zip(names, texts, strict=True)}}
    features = list(edit.coefficients)
    trials = [
        sweep.Trial([text.ids], sweep.measure(subject.model, subject.loaded, features or [0], ids, [text.ids]))
        for text in texts
    ]
    found = {name: figures(subject, features, ids, trial) for name, trial in zip(names, trials, strict=True)}
    yield None  # others may run
    verdict = None
    if edit.method != "ablate" and any(c > 0 for c in wanted.steer.coefficients.values()):
        read = [*ids, *texts[0].ids[:TEXT_TOKENS]]
        text_1T = torch.tensor([[*read[:1], *read[1:][1 - known.context :]]])
        verdict = verdict_of(subject, edit, text_1T, {1.0: trials[1]}, trials[0])
    yield {"texts": found, "verdict": verdict}


def figures(subject: Subject, features: list[int], prompt_ids: list[int], trial: sweep.Trial) -> dict[str, Any]:
    """Of a text its tokens, how strongly some features fire on each when it is read without an edit, and its figures.

    How strongly is the largest share of a feature's maximum.
    """
    model, loaded, n, (ids,) = subject.model, subject.loaded, len(prompt_ids), trial.texts
    tokens, shares = model.tokenizer.strings([*prompt_ids, *ids])[n:], [0.0] * len(ids)
    if features and ids:
        of_S = torch.tensor(features)
        activations_TS = sweep.read_back(model, loaded, of_S, torch.tensor([[*prompt_ids, *ids]]), n)[0]
        shares = (activations_TS / subject.statistics.maximum_F[of_S].clamp_min(1e-6)).amax(dim=1).tolist()
    return {"tokens": tokens, "shares": shares, "figures": trial.pooled._asdict()}


@torch.no_grad()
def difference_of_means(known: Known, wanted: asked.Rival) -> Tensor:
    """The mean residual (D) of the tokens of some texts less that of others, which needs no autoencoder."""
    model, layer = known.subject.model, known.subject.loaded.metadata.residual_layer

    def mean(texts: Sequence[str]) -> Tensor:
        rows = (torch.tensor([model.encode(text)[: known.context]]) for text in texts)
        found = [residuals_of(model, row, layer).float() for row in rows if row.shape[1] > 1]
        if not found:
            raise UserError("found no text among the examples: expected at least one on each side")
        return torch.cat(found).mean(dim=0)

    return mean(wanted.toward) - mean(wanted.away)
