"""What an edit does to the text: samples in batches, and what the model without the edit finds in them.

Shapes: B texts, T positions of a text with its prompt, F features, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_sae.model.language_model import LanguageModel, choose_token
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.steering import activations_of

NGRAM = 4  # tokens of a phrase that counts as repeated
# Text is fluent if it costs the unsteered model at most so many nats a token more than its own texts do, and if the
# share of it that is repeated is at most so much higher than theirs
MOST_NATS, MOST_REPETITION = 1.0, 0.15
ROWS = 64  # texts made at a time, where memory allows
LOGITS_BYTES = 2**28  # of logits at a time, which exist three times over


class Measured(NamedTuple):
    """What is found in a text that follows a prompt, or in several together."""

    tokens: int  # without the prompt; the figures below are means over them
    cross_entropy: float  # nats a token, of the model without the edit
    kl: float  # KL(with the edit || without) of the next-token distributions along the text, nats a token
    repetition: float  # share of the text's NGRAM-grams that occur in it earlier
    activation: float  # of the strongest of the features when the text is read back without the edit, after the prompt
    rate: float  # share of tokens on which one of them fires then


def sample(
    lm: LanguageModel, prompt_ids: Sequence[int], seeds: Sequence[int], max_tokens: int, temperature: float
) -> list[list[int]]:
    """Continuations of one prompt, one for each seed (B), made in one batch: each as `lm.generate` makes it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = lm.new_cache(len(seeds), len(prompt_ids) + max_tokens)
    tokens = torch.tensor([list(prompt_ids)] * len(seeds))
    texts: list[list[int]] = [[] for _ in seeds]
    ended = [False] * len(seeds)
    for _ in range(max_tokens):
        logits_BV = lm.forward(tokens, cache)[:, -1].cpu()
        chosen = [choose_token(row, temperature, 1.0, own) for row, own in zip(logits_BV, generators, strict=True)]
        for i, token in enumerate(chosen):
            ended[i] |= token == lm.tokenizer.eos_id
            if not ended[i]:
                texts[i].append(token)
        if all(ended):
            break
        tokens = torch.tensor(chosen)[:, None]
    return texts


@torch.no_grad()
def measure(
    lm: LanguageModel,
    loaded: LoadedSAE,
    features: Sequence[int],
    prompt_ids: Sequence[int],
    texts: Sequence[Sequence[int]],
    steered: AbstractContextManager,
) -> list[Measured]:
    """Figures of each text (B), `steered` being the edit under which it was made."""
    if not any(texts):
        return [Measured(0, 0.0, 0.0, 0.0, 0.0, 0.0) for _ in texts]
    n = len(prompt_ids)
    tokens_BT = torch.full((len(texts), n + max(map(len, texts))), lm.tokenizer.eos_id)
    for row, text in zip(tokens_BT, texts, strict=True):
        row[: n + len(text)] = torch.tensor([*prompt_ids, *text])
    lengths = torch.tensor([len(text) for text in texts])
    is_text = torch.arange(tokens_BT.shape[1] - n) < lengths[:, None]

    plain = lm.forward(tokens_BT)[:, n - 1 : -1].log_softmax(dim=-1)
    with steered:
        edited = lm.forward(tokens_BT)[:, n - 1 : -1].log_softmax(dim=-1)
    nats = -plain.gather(-1, tokens_BT[:, n:, None].to(plain.device)).squeeze(-1).cpu()
    kl = F.kl_div(plain, edited, log_target=True, reduction="none").sum(dim=-1).cpu()
    x = lm.residuals(tokens_BT, loaded.metadata.residual_layer)[:, n:].float()
    activation = activations_of(loaded.sae, x, torch.tensor(features, device=x.device))[0].amax(dim=-1).cpu()

    count = lengths.clamp_min(1)
    means = [((values * is_text).sum(dim=1) / count).tolist() for values in (nats, kl, activation, activation > 0)]
    return [
        Measured(len(text), ce, kl, repetition(text), mean, rate)
        for text, ce, kl, mean, rate in zip(texts, *means, strict=True)
    ]


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
    """Whether texts read about as well as the model's own, by MOST_NATS and MOST_REPETITION."""
    return (
        found.cross_entropy <= unsteered.cross_entropy + MOST_NATS
        and found.repetition <= unsteered.repetition + MOST_REPETITION
    )


class Setting(NamedTuple):
    """What one strength of an edit does."""

    scale: float  # what the coefficients were multiplied by
    text: list[int]  # the continuation of the first seed
    measured: Measured  # of all seeds' continuations
    fluent: bool


def sweep(
    lm: LanguageModel,
    loaded: LoadedSAE,
    features: Sequence[int],
    edit: Callable[[Tensor], AbstractContextManager],
    scales: Sequence[float],
    unsteered: Measured,
    *,
    prompt_ids: Sequence[int],
    seeds: Sequence[int],
    max_tokens: int,
    temperature: float,
) -> Iterator[Setting]:
    """The texts under an edit at each of some strengths, as they come, several strengths in a batch.

    Args:
        features: whose activations are read back.
        edit: strengths (B), one for each text of a batch, -> the edit, a context such as `steer`.
        unsteered: figures of the model's own texts, by which fluency is judged.
    """
    length = len(prompt_ids) + max_tokens
    at_once = max(1, min(ROWS, LOGITS_BYTES // (4 * length * lm.vocab_size)) // len(seeds))
    for start in range(0, len(scales), at_once):
        part = scales[start : start + at_once]
        scales_B = torch.tensor([scale for scale in part for _ in seeds])
        with edit(scales_B):
            texts = sample(lm, prompt_ids, [*seeds] * len(part), max_tokens, temperature)
        found = measure(lm, loaded, features, prompt_ids, texts, edit(scales_B))
        for i, scale in enumerate(part):
            own = slice(i * len(seeds), (i + 1) * len(seeds))
            figures = pooled(found[own])
            yield Setting(scale, texts[own][0], figures, is_fluent(figures, unsteered))


def strongest_fluent(settings: Sequence[Setting]) -> Setting | None:
    """The strongest of the settings at which the text is fluent; None if it is at none.

    A weaker one may fail: a few texts say little about repetition, and with chance alone one in many oversteps.
    """
    return max((setting for setting in settings if setting.fluent), key=lambda setting: setting.scale, default=None)


def random_directions(rows_SD: Tensor, seed: int) -> Tensor:
    """Random directions (S, D) of the norms of the given rows: what an edit of the same size does by itself."""
    noise_SD = torch.randn(rows_SD.shape, generator=torch.Generator().manual_seed(seed))
    norms = torch.linalg.vector_norm(rows_SD.detach().float().cpu(), dim=1, keepdim=True)
    return F.normalize(noise_SD, dim=1) * norms
