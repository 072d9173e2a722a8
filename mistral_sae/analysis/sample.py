"""The text that the questions are asked of: its tokens with their concepts, and what a model and an SAE do on them.

Shapes: R rows, T positions, N tokens that count, G documents, C concepts, D model width, H neurons of the MLP, K active
features.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mistral_sae.analysis.concepts import Labelled, token_labels
from mistral_sae.cli import Progress, UserError
from mistral_sae.data.activations import shuffled_batches
from mistral_sae.data.documents import Document, Skipped
from mistral_sae.data.tokens import Corpus, pack, shuffle
from mistral_sae.explain.cache import is_for_scoring
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.trainer import TrainConfig, Trainer

DOWN = ("feed_forward.w2", "mlp.down_proj")  # what reads a layer's neurons, in either library


class Texts(NamedTuple):
    """Rows of tokens, and what is known of those that count: no special tokens, no first positions."""

    tokens_RT: Tensor  # int64
    kept_RT: Tensor  # bool, N times True
    labels_NC: Tensor  # bool
    document_N: Tensor  # int64, of which document a token is
    fit_N: Tensor  # bool, True where directions and thresholds are chosen, False where they are scored
    concepts: list[str]  # C names
    documents: list[str]  # their ids

    @property
    def scored_G(self) -> Tensor:
        """Which documents (bool) are not to choose on."""
        return torch.zeros(len(self.documents), dtype=torch.bool).index_fill_(0, self.document_N[~self.fit_N], True)


def read_texts(
    labelled: Iterable[Labelled],
    concepts: list[str],
    model: LanguageModel,
    context_length: int,
    n_rows: int,
    most: int,
    skipped: Skipped,
) -> Texts:
    """Up to `n_rows` rows, at most `most` of them beginning with one and the same document.

    A document that a row cuts is labelled by its whole text; one whose tokens do not join to it is counted in
    `skipped`. Documents are halved by a hash of their ids: one half is to choose on, the other to score on. Raises
    UserError where either is empty.
    """
    labels: dict[str, np.ndarray] = {}
    taken: dict[str, int] = {}  # tokens of each document in the rows so far
    rows_of: dict[str, int] = {}

    def watched() -> Iterator[Document]:
        for each in labelled:
            found = token_labels(each, concepts, model.tokenizer)
            if found is None:
                skipped.add(each.document.id, "its tokens do not join to its text")
            else:
                labels[each.document.id] = found
                yield each.document

    tokens, marks, places, numbers = [], [], [], dict[str, int]()
    for row in pack(watched(), model.tokenizer, context_length):
        row_labels = np.zeros((context_length, len(concepts)), dtype=bool)
        row_places = np.full(context_length, -1)
        for i, name in enumerate(row.documents):
            at = row.document_of == i
            first = taken.get(name, 0)
            taken[name] = first + int(at.sum())
            row_labels[at] = labels[name][first : taken[name]]
            row_places[at] = numbers.setdefault(name, len(numbers))
        first_name = row.documents[0]
        rows_of[first_name] = rows_of.get(first_name, 0) + 1
        if rows_of[first_name] <= most:
            tokens.append(row.tokens)
            marks.append(row_labels)
            places.append(row_places)
        if len(tokens) == n_rows:
            break
    if not tokens:
        why = skipped.summary() or "there is too little"
        raise UserError(f"found not one row of labelled text ({why}): use more text, or a lower CONTEXT_LENGTH")
    tokens_RT, document_RT = torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(places))
    kept_RT = model.kept(tokens_RT) & (document_RT >= 0)
    document_N = document_RT[kept_RT]
    to_score = torch.tensor([is_for_scoring(name) for name in numbers])
    fit_N = ~to_score[document_N]
    if fit_N.all() or not fit_N.any():
        raise UserError("found labelled text for one of the two halves only: use more documents")
    labels_NC = torch.from_numpy(np.stack(marks))[kept_RT]
    return Texts(tokens_RT, kept_RT, labels_NC, document_N, fit_N, concepts, list(numbers))


class Activity(NamedTuple):
    """What a model and an autoencoder do on the tokens that count."""

    z_ND: Tensor  # the residual as the autoencoder standardises it
    values_NK: Tensor  # of the active features; 0 for none
    indices_NK: Tensor
    neurons_NH: Tensor | None  # of the layer's MLP, where it has one


def down_projection(model: LanguageModel, layer: int) -> nn.Linear | None:
    """What reads the neurons of a layer's MLP and writes to the residual; None in a mixture of experts."""
    down = [module for name, module in model.block(layer).named_modules() if name.endswith(DOWN)]
    return cast(nn.Linear, down[0]) if len(down) == 1 else None


@torch.no_grad()
def read_activity(
    model: LanguageModel, sae: SparseAutoencoder, layer: int, texts: Texts, rows_per_forward: int
) -> Activity:
    """One pass of the model over the rows, and of the encoder; all on the CPU."""
    down, caught = down_projection(model, layer), list[Tensor]()
    hooks = [down.register_forward_pre_hook(lambda module, args: caught.append(args[0]))] if down else []
    parts = []
    try:
        for tokens_BT, kept_BT in zip(
            texts.tokens_RT.split(rows_per_forward), texts.kept_RT.split(rows_per_forward), strict=True
        ):
            x_BTD = model.residuals(tokens_BT, layer)
            x_ND = x_BTD[kept_BT.to(x_BTD.device)]
            encoded = sae.encode(x_ND)
            part = [sae.standardize(x_ND)[0], encoded.values, encoded.indices]
            if hooks:
                part.append(caught.pop().view(*tokens_BT.shape, -1)[kept_BT.to(x_BTD.device)].float())
            parts.append([each.cpu() for each in part])
    finally:
        for hook in hooks:
            hook.remove()
    widest = max(part[1].shape[1] for part in parts)  # without a fixed K they differ
    for part in parts:
        part[1], part[2] = (torch.nn.functional.pad(each, (0, widest - each.shape[1])) for each in part[1:3])
    joined = [torch.cat(each) for each in zip(*parts, strict=True)]
    return Activity(joined[0], joined[1], joined[2], joined[3] if hooks else None)


# ---- the model that has learned nothing ----


@torch.no_grad()
def randomise(model: LanguageModel, seed: int) -> None:
    """Draw all matrices of a model anew, from a normal distribution of each one's own mean and variance.

    As Heap et al. 2025 do, embeddings included: what features of such a model tell of a text, its tokens tell alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in model.weights():
        if weight.ndim > 1:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * weight.float().std().cpu() + weight.float().mean().cpu())


def train_briefly(
    model: LanguageModel, layer: int, corpus: Corpus, sizes: TrainConfig, tokens: int, shuffle_rows: int
) -> SparseAutoencoder:
    """An autoencoder of the same sizes and rates, trained on a model for a number of tokens only."""
    steps = max(2, tokens // sizes.batch_size)
    brief = replace(
        sizes, train_tokens=steps * sizes.batch_size, warm_up_steps=min(sizes.warm_up_steps, math.ceil(steps / 10))
    )
    trainer = Trainer(brief, model.device)
    rows = shuffle(corpus.rows(model.tokenizer, held_out=False), shuffle_rows, brief.seed)
    batches: Any = shuffled_batches(
        rows,
        model,
        layer,
        batch_size=brief.batch_size,
        buffer_tokens=brief.buffer_tokens,
        rows_per_forward=brief.rows_per_forward,
        seed=brief.seed,
    )
    with Progress(desc="training", total=brief.train_tokens, unit=" tokens", unit_scale=True, leave=False) as bar:
        for step, (x_BD, _) in enumerate(islice(batches, brief.steps)):
            if step == 0:
                trainer.initialize(x_BD)
            trainer.step(x_BD, brief.learning_rate_at(step))
            bar.update(len(x_BD))
    return trainer.sae
