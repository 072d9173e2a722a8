"""Plausible records for the tests of the report, the same each time."""

import random

import torch

from mistral_sae.explain.report import Run
from mistral_sae.explain.types import BINS, INTERVALS, Example, Feature, Judgement, Label, Score
from mistral_sae.sae.features import decoder_geometry

NAMES = (
    "self",
    "return",
    "None",
    "raise",
    "Exception",
    "for",
    "x",
    "in",
    "range",
    "if",
    "not",
    "class",
    "import",
    "os",
)
TOKENS = (
    *".():,0=",
    "\n",
    "\n\n",
    "    ",
    "\t",
    "def",
    "area",
    *(f" {name}" for name in NAMES),
    " the",
    " of",
    " data",
)
WINDOW = 64
EXPLANATIONS = (
    "exceptions being raised",
    "loops over a range",
    "attributes of self; calls; weakly names",
    "imports of modules",
    "ends of lines",
)


def example(rng, trigger, strength, document, length=WINDOW):
    """A passage that peaks on `trigger` with `strength`; one that does not fire for a strength of 0."""
    tokens = [rng.choice([token for token in TOKENS if token != trigger]) for _ in range(length)]
    activations = [0.0] * length
    if strength:
        peak = length * 3 // 4
        tokens[peak], activations[peak] = trigger, strength
        for place in rng.sample(range(peak), 4):
            activations[place] = strength * rng.uniform(0.05, 0.9)
    return Example(f"{document}.py", 1 + rng.randrange(100), tuple(tokens), tuple(activations))


def make_feature(index, n_features=1000, seed=0):
    """A feature that fires on one token; each tenth is dead, each fifth raises what follows its peaks."""
    rng = random.Random(f"{seed} {index}")
    trigger = TOKENS[index % len(TOKENS)]
    nearest = tuple(((index + step) % n_features, round(0.6 / step, 3)) for step in range(1, 6))
    promoted = tuple((f" {rng.choice(TOKENS).strip()}{step}", 3.0 / step) for step in range(1, 11))
    suppressed = tuple((f"-{token}", -value) for token, value in promoted)
    if index % 10 == 9:
        return Feature(index, 0.0, 0.0, (0,) * BINS, promoted, suppressed, nearest)
    maximum = 2.0 + 0.01 * (index % 700)
    strengths = [maximum * (step + 0.5) / INTERVALS for step in range(INTERVALS) for _ in range(3)]
    passages = {
        "top": tuple(example(rng, trigger, maximum * (1 - 0.02 * step), f"top{step}") for step in range(8)),
        "spread": tuple(example(rng, trigger, s, f"spread{step}") for step, s in enumerate(strengths)),
        "held_out": tuple(example(rng, trigger, s, f"held{step}") for step, s in enumerate(strengths)),
        "random": tuple(example(rng, trigger, 0, f"random{step}") for step in range(6)),
        "hard": tuple(example(rng, trigger, 0, f"hard{step}") for step in range(6)),
    }
    if index % 5 == 0:
        followers = {p.tokens[p.peak + 1] for p in passages["top"] + passages["spread"]}
        promoted = tuple((token, 3.0 - 0.1 * step) for step, token in enumerate(sorted(followers)[:10]))
    histogram = tuple(int(5000 * 0.88**b) for b in range(BINS))
    density = 10 ** rng.uniform(-5, -1.2)
    coactive = tuple((other, round(0.9 * share, 3)) for other, share in nearest)
    return Feature(index, density, maximum, histogram, promoted, suppressed, nearest, coactive, **passages)


def make_label(index, seed=0):
    """A label whose detection is right but for one passage and one without an answer."""
    rng = random.Random(f"label {seed} {index}")
    if index % 10 == 9:
        return Label(index, "", "offline", "dead", {}, ())
    if index % 10 == 8:
        return Label(index, "", "offline", "no pattern", {}, (), "nothing in common")
    value = rng.uniform(0.6, 0.98)
    recall = tuple(min(1.0, value * (0.6 + 0.15 * step)) for step in range(INTERVALS))
    scores = {
        "detection": Score(value, value - 0.08, min(1.0, value + 0.07), 0.5, value - 0.1, 24, 1, recall),
        "fuzzing": Score(value - 0.03, value - 0.1, value, 0.51, None, 12, 0),
        "simulation": Score(value - 0.3, value - 0.4, value - 0.2, 0.02, 0.2, 12, 0, r2=0.31),
    }
    judged = [Judgement("detection", "held_out", place, True, True) for place in range(12)]
    judged += [Judgement("detection", kind, place, False, False) for kind in ("random", "hard") for place in range(6)]
    judged[3] = judged[3]._replace(verdict=False)
    judged[20] = judged[20]._replace(verdict=None)
    judged += [Judgement("fuzzing", "held_out", place, place % 2 == 0, True) for place in range(6)]
    explanation = f"{EXPLANATIONS[index % len(EXPLANATIONS)]}, case {index}"
    return Label(index, explanation, "offline", "ok", scores, tuple(judged))


def make_run(n_features=1000, d_model=64):
    """A run with everything that can be known of one."""
    generator = torch.Generator().manual_seed(0)
    metrics = [
        {"step": step, "tokens": 1024 * step, "normalized_mse": step**-0.5, "dead": 300 // step, "l0": 32.0}
        for step in range(1, 60)
    ]
    metrics[29] |= {"held_out_normalized_mse": 0.19, "ce_loss_recovered": 0.95}
    metrics[29] |= {"ce_loss_clean": 2.36, "ce_loss_with_sae": 2.65, "ce_loss_ablated": 7.9}
    evaluation = {"tokens": 32640, "l0": 32.0, "normalized_mse": 0.0964, "explained_variance": 0.9032}
    evaluation |= {"ce_loss_clean": 2.36, "ce_loss_with_sae": 2.46, "ce_loss_ablated": 7.9, "ce_loss_recovered": 0.9816}
    evaluation |= {"rare_fraction": 0.028, "dead_fraction": 0.0001}
    return Run(
        model="the bundled stand-in",
        layer=2,
        hook_name="blocks.2.hook_resid_post",
        corpus="standard library of CPython, 1,758 files",
        tokens=1_500_000,
        sae_path="runs/standin/sae",
        demo="python demo.py RUN_DIR=runs/standin",
        analyse="python analyse.py RUN_DIR=runs/standin",
        answers=None,
        d_model=d_model,
        n_features=n_features,
        evaluation=evaluation,
        metrics=metrics,
        density_F=10 ** (torch.randn(n_features, generator=generator) * 0.7 - 3).clamp(-5, 0),
        geometry=decoder_geometry(torch.randn(n_features, d_model, generator=generator)),
    )
