"""Which feature to steer with: what is known of features, and which of them match words.

Shapes: R rows, T positions, N features that are looked at, F features, V vocabulary.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.data.activations import residuals_of
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.model.tokenizer import Tokenizer
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.sae.features import Statistics
from mistral_sae.steer.steering import steer
from mistral_sae.steer.sweep import is_fluent, measure, pooled, sample

SHORTEST_STEM = 4  # letters from which on the beginning of a word stands for the word
CLASS = 5  # tokens by which a class of promoted tokens is judged
AT_ONCE = 64  # features whose promotions are measured in one forward
SAMPLE = (4, 32)  # rows and positions of the text on which the promotions of candidates are measured
LOOKED_AT, TRIED = 192, 32  # features among which one is looked for that shows in text
TRIAL = (4, 32)  # texts of each, and tokens of a text


def other_features(statistics: Statistics, seed: int, those: Collection[int]) -> list[int]:
    """As many random features of middle density as the given ones, other than those; none if there are fewer."""
    others = [feature for feature in statistics.mid_density() if feature not in those]
    return random.Random(seed).sample(others, len(those)) if len(others) >= len(those) else []


# ---- what a feature promotes ----


def extremes(lm: LanguageModel, scores_V: Tensor, count: int) -> tuple[list[str], list[str]]:
    """The tokens with the highest scores and those with the lowest, most extreme first."""
    order = scores_V.argsort(descending=True).tolist()
    highest, lowest = order[:count], order[: -count - 1 : -1]
    return [lm.tokenizer.strings([id])[0] for id in highest], [lm.tokenizer.strings([id])[0] for id in lowest]


@torch.no_grad()
def promotion(lm: LanguageModel, loaded: LoadedSAE, activations: Mapping[int, float], tokens_RT: Tensor) -> Tensor:
    """How far clamping each feature raises each token's logit (N, V), in standard deviations over the vocabulary.

    Measured: the mean change over the positions of some text (R, T), through the layers above, which the logit lens
    leaves out. `activations` are {feature: what it is clamped to}; each is clamped alone.
    """
    R, plain_RTV = len(tokens_RT), lm.forward(tokens_RT)[:, 1:]
    plain_V = plain_RTV.mean(dim=(0, 1))
    parts = []
    features = list(activations)
    for some in (features[i : i + AT_ONCE] for i in range(0, len(features), AT_ONCE)):
        with steer(lm, loaded, _alone({feature: activations[feature] for feature in some}, R)):
            logits_NTV = lm.forward(tokens_RT.repeat(len(some), 1))[:, 1:]
        parts.append(logits_NTV.unflatten(0, (len(some), R)).mean(dim=(1, 2)) - plain_V)
    change_NV = torch.cat(parts)
    return ((change_NV - change_NV.mean(dim=1, keepdim=True)) / change_NV.std(dim=1, keepdim=True)).cpu()


def clearness(promotion_NV: Tensor) -> Tensor:
    """How clear the class of tokens is that each feature promotes (N): the mean of its CLASS highest promotions."""
    return promotion_NV.topk(CLASS, dim=1).values.mean(dim=1)


# ---- features by words ----


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def are_alike(a: str, b: str) -> bool:
    """Whether two words are the same, or one begins with the other and that has SHORTEST_STEM letters or more."""
    return a == b or (min(len(a), len(b)) >= SHORTEST_STEM and (a.startswith(b) or b.startswith(a)))


def by_explanation(query: str, explanations: Mapping[int, str]) -> dict[int, float]:
    """Features whose explanations share words with the query, and their scores.

    The score is the sum over the query's words, of those that the explanation has, of log(1 + N / n): N explanations,
    n of which have the word. So a rare word counts for more than a frequent one, and all of them for more than some.
    """
    words = {feature: set(words_of(text)) for feature, text in explanations.items()}
    scores: Counter[int] = Counter()
    for wanted in set(words_of(query)):
        having = [feature for feature, own in words.items() if any(are_alike(wanted, word) for word in own)]
        for feature in having:
            scores[feature] += math.log(1 + len(words) / len(having))
    return dict(scores)


def tokens_like(tokenizer: Tokenizer, query: str) -> list[int]:
    """The tokens of the vocabulary that are words of the query, or begin with one, or begin one."""
    wanted = words_of(query)
    texts = ((id, words_of(tokenizer.strings([id])[0])) for id in range(tokenizer.vocab_size))
    return [id for id, words in texts if len(words) == 1 and any(are_alike(words[0], word) for word in wanted)]


@torch.no_grad()
def by_firing(
    lm: LanguageModel, loaded: LoadedSAE, ids: Sequence[int], batches: Iterable[Tensor], count: int
) -> list[int]:
    """The features that tell some tokens apart best: those that fire on them, or right before them, and not elsewhere.

    By F1 of firing on a token of rows (R, T) as a prediction that it, or the one after it, is among `ids`.
    """
    sae, layer = loaded.sae, loaded.metadata.residual_layer
    wanted = torch.tensor(ids)
    fired_F = torch.zeros(sae.n_features)
    right_2F, there_2 = torch.zeros(2, sae.n_features), torch.zeros(2, 1)
    for tokens_RT in batches:
        encoded = sae.encode(residuals_of(lm, tokens_RT[:, :-1], layer))  # each with a token after it
        is_active = (encoded.values > 0).cpu()
        indices = encoded.indices.cpu()
        fired_F += torch.bincount(indices[is_active], minlength=sae.n_features)
        is_wanted = torch.isin(tokens_RT, wanted)
        for i, is_it in enumerate((is_wanted[:, 1:-1].flatten(), is_wanted[:, 2:].flatten())):
            right_2F[i] += torch.bincount(indices[is_it][is_active[is_it]], minlength=sae.n_features)
            there_2[i] += is_it.sum()
    f1_F = (2 * right_2F / (fired_F + there_2).clamp_min(1)).amax(dim=0)
    best = f1_F.topk(min(count, len(f1_F)))
    return [feature for feature, f1 in zip(best.indices.tolist(), best.values.tolist(), strict=True) if f1 > 0]


class Found(NamedTuple):
    """A feature that was looked for."""

    feature: int
    match: float  # of its explanation with the words, as `by_explanation` scores it; 0 for one found otherwise
    # Mean of its CLASS highest promotions, of the words' tokens where there are words; of `most_visible` on how many
    # more in a hundred tokens it fires in steered text than in the model's own
    strength: float
    promoted: list[str]  # the tokens it promotes most


def find(
    query: str,
    lm: LanguageModel,
    loaded: LoadedSAE,
    statistics: Statistics,
    explanations: Mapping[int, str],
    rows: Callable[[], Tensor],
) -> list[Found]:
    """Features for words, best first: those whose explanations match, then those that fire on the words' tokens.

    The latter are looked for in `rows()` (R, T), some text, unless an explanation matches and every feature has one. Of
    features that match equally well, first the one that promotes the words' tokens most. Empty where no explanation
    matches and no token of the vocabulary does, or none of the features fires on it.
    """
    ids, matches = tokens_like(lm.tokenizer, query), by_explanation(query, explanations)
    candidates = sorted(matches, key=matches.__getitem__, reverse=True)[:AT_ONCE]
    if ids and not (matches and len(explanations) == loaded.sae.n_features):
        by_tokens = by_firing(lm, loaded, ids, rows().split(16), AT_ONCE)
        candidates += [feature for feature in by_tokens if feature not in matches]
    found = _promoting(lm, loaded, statistics, candidates, ids)
    found = [each._replace(match=matches.get(each.feature, 0.0)) for each in found]
    return sorted(found, key=lambda each: (-each.match, -each.strength))


def most_visible(
    lm: LanguageModel,
    loaded: LoadedSAE,
    statistics: Statistics,
    among: Collection[int],
    prompt_ids: Sequence[int],
    temperature: float,
) -> list[Found]:
    """Features that show in text, first the one that fires most in texts that continue a prompt while it is clamped.

    Of LOOKED_AT random ones of the features given, the TRIED with the clearest classes of promoted tokens are tried, at
    their maxima and in texts of TRIAL's size. Those whose texts are not fluent come last.
    """
    candidates = random.Random(0).sample(sorted(among), min(LOOKED_AT, len(among)))
    found = _promoting(lm, loaded, statistics, candidates, [])
    tried = sorted(found, key=lambda each: -each.strength)[:TRIED]
    R, T = TRIAL
    own = sample(lm, prompt_ids, range(R), T, temperature)
    with steer(lm, loaded, _alone({each.feature: float(statistics.maximum_F[each.feature]) for each in tried}, R)):
        texts = sample(lm, prompt_ids, [*range(R)] * len(tried), T, temperature)
    ranked = []
    for i, each in enumerate(tried):
        plain, steered = (
            pooled(measure(lm, loaded, [each.feature], prompt_ids, some, nullcontext()))
            for some in (own, texts[i * R : (i + 1) * R])
        )
        more = 100 * (steered.rate - plain.rate)
        ranked.append((not is_fluent(steered, plain), -more, each._replace(strength=more)))
    return [each for *_, each in sorted(ranked)]


def _alone(activations: Mapping[int, float], n_rows: int) -> dict[int, Tensor]:
    """Coefficients by which each feature is clamped in rows of its own, so many, and is as it is in the others'."""
    alone = torch.full((len(activations), len(activations)), torch.nan)
    alone.diagonal().copy_(torch.tensor(list(activations.values())))
    return {f: column.repeat_interleave(n_rows) for f, column in zip(activations, alone.T, strict=True)}


def _promoting(
    lm: LanguageModel, loaded: LoadedSAE, statistics: Statistics, candidates: Sequence[int], ids: Sequence[int]
) -> list[Found]:
    """The candidates that ever fire, and what they promote: of some tokens, or of all if `ids` is empty."""
    activations = {f: float(statistics.maximum_F[f]) for f in candidates if statistics.maximum_F[f] > 0}
    if not activations:
        return []
    found = []
    promotion_NV = promotion(lm, loaded, activations, _text_of(lm))
    for feature, promotion_V in zip(activations, promotion_NV, strict=True):
        wanted = promotion_V[ids] if ids else promotion_V
        strength = wanted.topk(min(CLASS, len(wanted))).values.mean().item()
        found.append(Found(feature, 0.0, strength, extremes(lm, promotion_V, CLASS)[0]))
    return found


def _text_of(lm: LanguageModel) -> Tensor:
    """Text of the model's own (R, T), of SAMPLE's size and the same each time: this needs no corpus."""
    R, T = SAMPLE
    start = [lm.tokenizer.bos_id]
    texts = sample(lm, start, range(R), T - 1, temperature=1.0)
    return torch.tensor([start + text + [lm.tokenizer.eos_id] * (T - 1 - len(text)) for text in texts])
