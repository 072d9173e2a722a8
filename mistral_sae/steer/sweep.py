"""What an edit does to text: samples in batches, and what the model without the edit finds in them.

Shapes: B texts, T positions of a text with its prompt, S features, D model width, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.model.hooks import edit_residual
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.steering import Edit, Subject, activations_of

NGRAM = 4  # tokens of a phrase that counts as repeated
# Text is fluent if it costs the unsteered model at most so many nats a token more than its own texts do, and if the
# share of it that is repeated is at most so much higher than theirs
MOST_NATS, MOST_REPETITION = 1.0, 0.15
LEAST_TOKENS = 0.5  # of the length of its own texts: one that ends at once is neither
ROWS = 64  # texts made at a time: a few cost hardly more than one
LOGITS_BYTES = 2**28  # of logits at a time, which exist three times over

S = TypeVar("S")


# ---- figures of a text ----


class Measured(NamedTuple):
    """What is found in a text that follows a prompt, or in several together."""

    tokens: int  # without the prompt; the figures below are means over them
    cross_entropy: float  # nats a token, of the model without the edit
    kl: float  # KL(with the edit || without) of the next-token distributions along the text, nats a token
    repetition: float  # share of the text's NGRAM-grams that occur in it earlier
    activation: float  # of the strongest of the features when the text is read back without the edit, after the prompt
    rate: float  # share of tokens on which one of them fires then


@torch.no_grad()
def measure(
    model: LanguageModel,
    loaded: LoadedSAE,
    features: Sequence[int] | Tensor,
    prompt_ids: Sequence[int],
    texts: Sequence[Sequence[int]],
    steered: AbstractContextManager | None = None,
) -> list[Measured]:
    """Figures of each text (B).

    Args:
        features: whose activations are read back: the same for all texts, or a tensor (B, S), those of each.
        steered: the edit under which the texts were made; None for the model's own, whose divergence is 0.
    """
    if not any(texts):
        return [Measured(0, 0.0, 0.0, 0.0, 0.0, 0.0) for _ in texts]
    n = len(prompt_ids)
    tokens_BT = torch.full((len(texts), n + max(map(len, texts))), model.tokenizer.eos_id)
    for row, text in zip(tokens_BT, texts, strict=True):
        row[: n + len(text)] = torch.tensor([*prompt_ids, *text])
    lengths_B = torch.tensor([len(text) for text in texts])
    is_text_BT = torch.arange(tokens_BT.shape[1] - n) < lengths_B[:, None]

    x_BTD = torch.empty(0)

    def read(residual_BTD: Tensor) -> Tensor:
        nonlocal x_BTD
        x_BTD = residual_BTD[:, n:]
        return residual_BTD

    with edit_residual(model, loaded.metadata.residual_layer, read):  # in the forward that gives the logits, too
        plain_BTV = model.log_probabilities(tokens_BT)[:, n - 1 :]
    nats_BT = -plain_BTV.gather(-1, tokens_BT[:, n:, None].to(plain_BTV.device)).squeeze(-1).cpu()
    kl_BT = torch.zeros_like(nats_BT)
    if steered is not None:
        with steered:
            edited_BTV = model.log_probabilities(tokens_BT)[:, n - 1 :]
        kl_BT = F.kl_div(plain_BTV, edited_BTV, log_target=True, reduction="none").sum(dim=-1).cpu()
    features_S = torch.as_tensor(features)
    if features_S.ndim == 2:
        features_S = features_S[:, None, None]  # (B, S): the same at all positions of a text
    activation_BT = activations_of(loaded.sae, x_BTD.float(), features_S)[0].cpu().amax(dim=-1)

    figures = (nats_BT, kl_BT, activation_BT, activation_BT > 0)
    means = [((values * is_text_BT).sum(dim=1) / lengths_B.clamp_min(1)).tolist() for values in figures]
    return [
        Measured(len(text), ce, kl, repetition(text), mean, rate)
        for text, ce, kl, mean, rate in zip(texts, *means, strict=True)
    ]


def read_back(
    model: LanguageModel, loaded: LoadedSAE, features_S: Tensor, tokens_BT: Tensor, prompt_length: int
) -> Tensor:
    """Activations (B, T, S) of features after the prompt, on the CPU, of tokens (B, T) that include it."""
    x_BTD = model.residuals(tokens_BT, loaded.metadata.residual_layer)[:, prompt_length:].float()
    return activations_of(loaded.sae, x_BTD, features_S)[0].cpu()


def shares_of_maxima(
    subject: Subject, features: Sequence[int], prompt_ids: Sequence[int], ids: Sequence[int]
) -> list[float]:
    """How strongly some features fire on each token of a text, read without an edit: the largest share of a maximum."""
    if not features or not ids:
        return [0.0] * len(ids)
    of_S, tokens_1T = torch.tensor(features), torch.tensor([[*prompt_ids, *ids]])
    activations_TS = read_back(subject.model, subject.loaded, of_S, tokens_1T, len(prompt_ids))[0]
    return (activations_TS / subject.statistics.maximum_F[of_S].clamp_min(1e-6)).amax(dim=1).tolist()


def repetition(text: Sequence[int]) -> float:
    """Share of the NGRAM-grams of a text's tokens that occur in it earlier; 0 for a text shorter than one."""
    grams = [tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def pooled(measured: Sequence[Measured]) -> Measured:
    """The figures of several texts together, each token counting once."""
    tokens, *columns = zip(*measured, strict=True)
    means = (sum(n * value for n, value in zip(tokens, column, strict=True)) for column in columns)
    return Measured(sum(tokens), *(mean / max(1, sum(tokens)) for mean in means))


def is_fluent(found: Measured, unsteered: Measured) -> bool:
    """Whether as many texts read about as well as the model's own, by MOST_NATS, MOST_REPETITION and LEAST_TOKENS."""
    return (
        found.cross_entropy <= unsteered.cross_entropy + MOST_NATS
        and found.repetition <= unsteered.repetition + MOST_REPETITION
        and found.tokens >= unsteered.tokens * LEAST_TOKENS
    )


# ---- texts under one edit after another ----


class Trial(NamedTuple):
    """The texts that one edit makes, one for each seed, and their figures."""

    texts: list[list[int]]
    measured: list[Measured]

    @property
    def pooled(self) -> Measured:
        """The figures of all texts together."""
        return pooled(self.measured)


class Trials(NamedTuple):
    """Texts that continue a prompt, one for each seed, under one edit after another."""

    model: LanguageModel
    loaded: LoadedSAE
    prompt_ids: Sequence[int]
    seeds: Sequence[int]
    max_tokens: int
    temperature: float

    def text_of(self, ids: Sequence[int]) -> str:
        """A text of these, without the prompt that it continues."""
        return self.model.tokenizer.decode_continuation(list(self.prompt_ids), list(ids))

    def unsteered(self, features: Sequence[int]) -> Trial:
        """The model's own texts."""
        texts = self._texts(1)
        return Trial(texts, measure(self.model, self.loaded, features, self.prompt_ids, texts))

    def steered(
        self,
        settings: Sequence[S],
        edit: Callable[[list[S]], AbstractContextManager],
        features: Callable[[S], Sequence[int]],
        with_kl: bool = True,
    ) -> Iterator[Trial]:
        """The texts of each setting, such as a coefficient or a feature, as they come, several settings in a batch.

        Args:
            edit: the settings (B), one for each text of a batch, -> the edit, a context such as `steer`.
            features: a setting -> the features whose activations are read back.
            with_kl: measure the divergence, which takes a forward more.
        """
        n, length = len(self.seeds), len(self.prompt_ids) + self.max_tokens
        for some in _split(settings, settings_at_once(n)):
            of_each_text = [setting for setting in some for _ in self.seeds]
            with edit(of_each_text):
                texts = iter(self._texts(len(some)))
            for part in _split(some, settings_read_at_once(n, length, self.model.vocab_size)):
                of_each_text = [setting for setting in part for _ in self.seeds]
                of = torch.tensor([features(setting) for setting in of_each_text])
                again = edit(of_each_text) if with_kl else None
                own = list(islice(texts, len(of)))
                found = measure(self.model, self.loaded, of, self.prompt_ids, own, again)
                for i in range(0, len(own), n):
                    yield Trial(own[i : i + n], found[i : i + n])

    def _texts(self, times: int) -> list[list[int]]:
        return self.model.sample(self.prompt_ids, [*self.seeds] * times, self.max_tokens, self.temperature)


def _split(settings: Sequence[S], size: int) -> Iterator[Sequence[S]]:
    return (settings[start : start + size] for start in range(0, len(settings), size))


def settings_at_once(texts: int) -> int:
    """Settings with so many texts each whose texts are made together."""
    return max(1, ROWS // texts)


def settings_read_at_once(texts: int, length: int, vocab_size: int) -> int:
    """Settings with so many texts each, of at most so many tokens, whose texts are read back together."""
    return max(1, min(ROWS, LOGITS_BYTES // (4 * length * vocab_size)) // texts)


def strongest_fluent(scales: Sequence[float], trials: Sequence[Trial], own: Trial) -> float | None:
    """The strongest of the edits, by their scales, at which texts are fluent; None if they are at none.

    All of them together, and the first, which is the one that is shown, by itself. A weaker edit may fail: a few texts
    say little about repetition, and with chance alone one in many oversteps. What comes after two failures in a row is
    not looked at, as one in many passes by chance, too.
    """
    strongest, failed = None, 0
    for scale, trial in zip(scales, trials, strict=True):
        if is_fluent(trial.pooled, own.pooled) and is_fluent(trial.measured[0], own.measured[0]):
            strongest, failed = scale, 0
        elif (failed := failed + 1) == 2:
            break
    return strongest


# ---- controls ----


def with_controls(subject: Subject, edit: Edit, seed: int) -> list[tuple[str, Edit, Tensor | None]]:
    """An edit and what to compare it with: (title, edit, directions to write along or None).

    The controls are an edit of the same size along random directions, and as many random features of middle density,
    if there are as many.
    """
    own = list(edit.coefficients)
    directions_SD = random_directions(subject.loaded.sae.W_dec[own], seed)
    found = [
        (f"feature {', '.join(map(str, own))}", edit, None),
        ("control: random direction, the same size of edit", edit, directions_SD),
    ]
    others = [feature for feature in subject.statistics.mid_density() if feature not in own]
    if len(others) >= len(own):
        others = random.Random(seed).sample(others, len(own))
        title = f"control: at random, feature {', '.join(map(str, others))}"
        coefficients = dict(zip(others, edit.coefficients.values(), strict=True))
        found.append((title, replace(edit, coefficients=coefficients), None))
    return found


def random_directions(rows_SD: Tensor, seed: int) -> Tensor:
    """Random directions (S, D) of the norms of the given rows: what an edit of the same size does by itself."""
    noise_SD = torch.randn(rows_SD.shape, generator=torch.Generator().manual_seed(seed))
    norms_S1 = torch.linalg.vector_norm(rows_SD.detach().float().cpu(), dim=1, keepdim=True)
    return F.normalize(noise_SD, dim=1) * norms_S1
