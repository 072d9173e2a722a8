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
from mistral_sae.live.known import Known
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.steer import sweep
from mistral_sae.steer.steering import Edit, Subject

Finish = Literal["stop", "length"]
Context = Callable[[], AbstractContextManager[object]]  # the edit, for one forward


class Growing:
    """A text that grows by tokens until its end: the EOS, a stop sequence, or the length that was asked for.

    A reply begins without the space that sentencepiece puts before a text.

    Attributes:
        ids: its tokens so far.
        finish: why it ended; None while it grows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), is_reply: bool = False):
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._drops_space = is_reply
        self._tokenizer, self._stops, self._held = tokenizer, [stop for stop in stops if stop], ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """What there is to show after one more token; what may become a stop sequence is held back."""
        if self.finish:
            return ""
        if id == self._tokenizer.eos_id:
            return self.end("stop")
        self.ids.append(id)
        self._held += self._decoder.decode(self._tokenizer.token_bytes(id))
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self._held = self._held[: min(ends)]
            return self._take(len(self._held), "stop")
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return self._take(len(self._held) - max(begun, default=0))

    def end(self, finish: Finish = "length") -> str:
        """What was held back."""
        self._held += self._decoder.decode(b"", final=True)
        return self._take(len(self._held), finish)

    def _take(self, count: int, finish: Finish | None = None) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        if self._drops_space and (shown := shown.lstrip(" ")):
            self._drops_space = False
        self.finish = self.finish or finish
        return shown


def grow(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    texts: Sequence[Growing],
    seeds: Sequence[int],
    max_tokens: int,
    temperature: float,
    context: Context,
) -> Iterator[list[str]]:
    """The next piece of each text, a step at a time, with what was held back at the end; `generate`'s tokens.

    They are made in one batch. The edit is entered for each step anew, as other jobs run between two of them.
    """
    steps = model.next_tokens(prompt_ids, seeds, max_tokens, temperature)
    finish: Finish = "length"
    for _ in range(max_tokens):
        with context():
            ids = next(steps, None)
        if ids is None:  # the EOS of those that are left
            finish = "stop"
            break
        yield [text.add(id) for text, id in zip(texts, ids, strict=True)]
        if all(text.finish for text in texts):
            return
    yield ["" if text.finish else text.end(finish) for text in texts]


# ---- side by side ----


def write(known: Known, wanted: asked.Writing) -> Iterator[dict[str, Any]]:
    """Pieces of the model's own text, the steered one and a rival's, in one batch as in demo.py; then their figures."""
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

    texts = [Growing(subject.model.tokenizer, wanted.stop) for _ in names]
    seeds = [wanted.seed] * rows
    for step in grow(subject.model, ids, texts, seeds, wanted.max_tokens, wanted.temperature, context):
        yield {"pieces": dict(zip(names, step, strict=True))}
    features = list(edit.coefficients)
    yield {"texts": {name: figures(subject, features, ids, text.ids) for name, text in zip(names, texts, strict=True)}}


def figures(subject: Subject, features: list[int], prompt_ids: list[int], ids: list[int]) -> dict[str, Any]:
    """Of a text its tokens, how strongly some features fire on each when it is read without an edit, and `measure`'s.

    How strongly is the largest share of a feature's maximum.
    """
    model, loaded, n = subject.model, subject.loaded, len(prompt_ids)
    tokens, shares = model.tokenizer.strings([*prompt_ids, *ids])[n:], [0.0] * len(ids)
    (found,) = sweep.measure(model, loaded, features or [0], prompt_ids, [ids])
    if features and ids:
        of_S = torch.tensor(features)
        activations_TS = sweep.read_back(model, loaded, of_S, torch.tensor([[*prompt_ids, *ids]]), n)[0]
        shares = (activations_TS / subject.statistics.maximum_F[of_S].clamp_min(1e-6)).amax(dim=1).tolist()
    return {"tokens": tokens, "shares": shares, "figures": found._asdict()}


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
