"""The model's own text and the steered one side by side, token by token, and what is to be said of them.

Shapes: T positions, S steered features, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.data.activations import residuals_of
from mistral_sae.live import asked
from mistral_sae.live.batches import Batch, Growing
from mistral_sae.live.known import Known
from mistral_sae.live.looking import verdict_of
from mistral_sae.model.language_model import Row
from mistral_sae.steer import sweep
from mistral_sae.steer.search import TEXT_TOKENS
from mistral_sae.steer.steering import Edit, Subject


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
    if edit.method != "ablate" and any(c and c > 0 for c in edit.coefficients.values()):
        read = [*ids, *texts[0].ids[:TEXT_TOKENS]]
        text_1T = torch.tensor([[*read[:1], *read[1:][1 - known.context :]]])
        verdict = verdict_of(subject, edit, text_1T, {1.0: trials[1]}, trials[0])
    yield {"texts": found, "verdict": verdict}


def figures(subject: Subject, features: list[int], prompt_ids: list[int], trial: sweep.Trial) -> dict[str, Any]:
    """Of a text its tokens, how strongly some features fire on each when it is read without an edit, and its figures.

    How strongly is the largest share of a feature's maximum.
    """
    (ids,) = trial.texts
    tokens = subject.model.tokenizer.strings([*prompt_ids, *ids])[len(prompt_ids) :]
    shares = sweep.shares_of_maxima(subject, features, prompt_ids, ids)
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
