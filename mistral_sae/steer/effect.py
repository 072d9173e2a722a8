"""How strongly a feature can be steered with, and what a reader sees of it then.

Each feature is tried at growing strengths in a few texts, many in a batch. What counts is the strongest at which they
stay fluent, and how much more the texts show of the feature than the model's own do.

Shapes: R rows, T positions, D model width, S features.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_sae.cli import Progress
from mistral_sae.steer.steering import Edit, SteeringError, Subject, make_edit
from mistral_sae.steer.sweep import MOST_NATS, MOST_REPETITION, Measured, Trials, read_back, strongest_fluent

# The strengths that are tried, as lengths of the edit beside the residual's: texts stop being fluent at about a half,
# whatever the feature, where its maximum may be anything
SIZES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
CHANCE = 0.05  # by which a few texts repeat themselves more or less than a few others
VISIBLE, ENOUGH = 0.02, 0.15  # of the tokens: from where on a reader sees an effect, and where more of it is not better

# What shows a feature: tokens, or what gives the share of the tokens of texts that do
Class = Collection[int] | Callable[[Sequence[Sequence[int]]], float]


def strengths_of(subject: Subject, unit: Edit, x_TD: Tensor) -> list[float]:
    """The multiples of an edit that move residuals (T, D) by SIZES, to two digits; for "ablate", which has none, 1.

    So one grid serves all methods, each in its own unit, and does something on any model. Raises SteeringError for an
    edit that moves nothing.
    """
    if unit.method == "ablate":
        return [1.0]

    def edited(times: float) -> Tensor:
        given = {f: c for f, c in unit.times(times).in_units_of_steer(subject).items() if c is not None}
        return make_edit(subject.loaded.sae, given, unit.method, x_TD.device)(x_TD[None])[0]

    moved_TD = edited(2.0) - edited(1.0)  # without what clamping takes away of the feature
    size = float((moved_TD.norm(dim=-1) / x_TD.norm(dim=-1)).median())
    if not size > 0:
        raise SteeringError(f"found no effect of feature {', '.join(map(str, unit.coefficients))}: expected another")
    return [float(f"{wanted / size:.2g}") for wanted in SIZES]


class Effect(NamedTuple):
    """What steering with a feature does to texts, at the strongest of some strengths at which they stay fluent."""

    feature: int
    strength: float  # in the method's unit; the weakest, where the texts are fluent at none
    is_fluent: bool
    steered: Measured  # the figures of the texts together
    own: Measured  # and those of the model's own; the rate is this feature's
    shown: float  # share of the texts' tokens that are of the feature's class
    own_shown: float  # the same of the model's own
    tried: Sequence[float]  # the strengths
    texts: Sequence[list[int]] = ()  # the first of the model's own and the first of the steered ones

    @property
    def score(self) -> float:
        """How much more is seen of the feature than in the model's own texts, less how much more they repeat."""
        return self.gain - max(0.0, self.repeated - CHANCE)

    @property
    def repeated(self) -> float:
        """How much more of the texts is repeated than of the model's own."""
        return self.steered.repetition - self.own.repetition

    @property
    def gain(self) -> float:
        """How many more tokens are of its class and how many more it fires on, each up to ENOUGH: their geometric mean.

        So what is counted is both: words that the feature raises whatever they mean, or tokens that it fires on where
        nothing is to be read of it, are no effect.
        """
        return math.sqrt(math.prod(min(max(gain, 0.0), ENOUGH) for gain in self.gains))

    @property
    def gains(self) -> tuple[float, float]:
        """How many more tokens are of its class, and how many more it fires on, as shares of the texts."""
        return self.shown - self.own_shown, self.steered.rate - self.own.rate

    @property
    def is_visible(self) -> bool:
        """Whether a reader sees it, in texts that are no loops."""
        return self.is_fluent and self.score >= VISIBLE

    def why(self) -> str:
        """One line: which strengths were tried, which is taken, and for what reason."""
        nats = self.steered.cross_entropy - self.own.cross_entropy
        reason = "the strongest that keeps texts fluent" if self.is_fluent else "the weakest, as none does"
        return (
            f"{self.strength:g} of {', '.join(f'{strength:g}' for strength in self.tried)}: {reason} ({nats:+.2f} nats "
            f"a token, {self.repeated:+.0%} repeated; at most {MOST_NATS:+g} and {MOST_REPETITION:+.0%})"
        )

    def rank(self) -> tuple[bool, float, float, int]:
        """What sorts the most visible first, of equals by the sum of the gains, and those that are not fluent last."""
        return (not self.is_fluent, -self.score, -sum(self.gains), self.feature)


def effects_of(
    subject: Subject,
    edit: Edit,
    strengths: Mapping[int, Sequence[float]],
    classes: Mapping[int, Class],
    trials: Trials,
    directions: Mapping[int, Tensor] | None = None,
) -> list[Effect]:
    """What steering with each feature alone does to texts.

    Args:
        edit: how; its coefficients are not used.
        strengths: by feature, from weak to strong.
        classes: by feature, what shows it.
        directions: by feature, what to write along (D) in place of its decoder row, as a control.
    """
    features, ids = list(strengths), trials.prompt_ids
    settings = [(feature, strength) for feature, some in strengths.items() for strength in some]
    unsteered = (features[0], math.nan)  # as it is: in the same batch, which costs little more

    def context(settings_B: list[tuple[int, float]]) -> AbstractContextManager[None]:
        alone = each_alone(settings_B)
        along_SD = None if directions is None else torch.stack([directions[feature] for feature in alone])
        return replace(edit, coefficients=alone).context(subject, len(ids), along_SD)

    steered = trials.steered([unsteered, *settings], context, lambda setting: setting[:1], with_kl=False)
    own, *tried = Progress(steered, "steered texts", 1 + len(settings), unit=" settings", leave=False)
    by_setting = dict(zip(settings, tried, strict=True))
    texts = [torch.tensor([[*ids, *text]]) for text in own.texts if text]
    of_S = torch.tensor(features)
    fired = [read_back(subject.model, subject.loaded, of_S, text, len(ids))[0] > 0 for text in texts]
    rates = torch.cat(fired or [torch.zeros(1, len(features))]).float().mean(dim=0).tolist()
    found = []
    for feature, rate in zip(features, rates, strict=True):
        some, own_figures = strengths[feature], own.pooled._replace(rate=rate)
        strongest = strongest_fluent(some, [by_setting[feature, strength] for strength in some], own)
        strength = some[0] if strongest is None else strongest
        trial = by_setting[feature, strength]
        shown, own_shown = (share_of(each.texts, classes.get(feature, ())) for each in (trial, own))
        is_fluent, first = strongest is not None, (own.texts[0], trial.texts[0])
        found.append(Effect(feature, strength, is_fluent, trial.pooled, own_figures, shown, own_shown, some, first))
    return found


def each_alone(of_row: Sequence[tuple[int, float]]) -> dict[int, Tensor]:
    """Coefficients by which each row of a batch has one feature steered, by (feature, strength), and no other."""
    return {
        feature: torch.tensor([strength if own == feature else math.nan for own, strength in of_row])
        for feature in dict.fromkeys(own for own, _ in of_row)
    }


def share_of(texts: Sequence[Sequence[int]], shows: Class) -> float:
    """Share of the tokens of texts that are of a class."""
    if callable(shows):
        return shows(texts)
    found = [id in shows for text in texts for id in text]
    return sum(found) / max(1, len(found))
