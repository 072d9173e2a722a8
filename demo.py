"""Steer a Mistral with a feature: `python demo.py [NAME=value ...]`.

Prints the model's own continuation of a prompt beside the steered one. SWEEP=1 prints a table over coefficients
instead, CHAT=1 starts a conversation. The constants are in config.py.
"""

import config
from mistral_sae import cli

if __name__ == "__main__":
    cli.start("demo", config)  # before the imports below take their seconds

import ast
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mistral_sae.data.activations import residuals_of
from mistral_sae.data.tokens import Corpus, batches
from mistral_sae.explain import examples
from mistral_sae.explain.labels import read_labels
from mistral_sae.explain.types import Label
from mistral_sae.files import hash_of
from mistral_sae.loading import open_both
from mistral_sae.model import language_model as lm
from mistral_sae.sae import features
from mistral_sae.sae.checkpoint import LoadedSAE, hash_of_sae
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.steer import chat, search, steering, sweep
from mistral_sae.steer import display as screen
from mistral_sae.steer.steering import SteeringError

SCAN_ROWS = 48  # rows of held-out text that are read to find features by their tokens
MAXIMUM_TOKENS = 200_000  # that are read to measure features' maxima, for an autoencoder that comes without
POOR_FIT = 0.5  # explained variance below which an autoencoder is not one of this model's
LISTED = 3  # features of a ranked list
SHOWN = 10  # tokens that a feature promotes


class Subject(NamedTuple):
    """What is steered, and with what."""

    model: lm.LanguageModel
    loaded: LoadedSAE
    statistics: features.Statistics
    explanations: dict[int, Label]


Coefficients = dict[int, float | None]  # by feature, in METHOD's unit


def main() -> None:
    """Load the autoencoder and the model, choose the feature; then a text, a table or a conversation."""
    loaded, model = open_both(
        sae_path=config.SAE_PATH,
        run_dir=config.RUN_DIR,
        hook_name=config.HOOK_NAME,
        model_path=config.MISTRAL_MODEL_PATH,
        device=config.DEVICE,
        dtype=config.DTYPE,
    )
    subject = Subject(model, loaded, statistics_of(model, loaded), read_explanations(loaded))
    coefficients = choose(subject, config.FEATURE_INDEX, config.COEFFICIENT)
    in_unit_of(config.METHOD, coefficients, subject)  # what cannot be steered is said before anything is generated
    if config.CHAT:
        talk(subject, coefficients)
    elif config.SWEEP:
        show_sweep(subject, coefficients)
    else:
        show_texts(subject, coefficients)


# ---- side by side ----


def show_texts(subject: Subject, coefficients: Coefficients) -> None:
    """The model's own continuation beside the steered one, and what they are."""
    model, console = subject.model, Console(highlight=False)
    prompt_ids = encode_prompt(model)
    steered = edit(subject, config.METHOD, coefficients, len(prompt_ids)) if config.STEERING_ON else nullcontext()
    generated = {}
    for name, context in (("without steering", nullcontext()), ("with steering", steered)):
        ids = model.generate(prompt_ids, config.NEW_TOKENS, config.TEMPERATURE, seed=config.SEED)
        with context:
            generated[name] = list(tqdm(ids, name, config.NEW_TOKENS, unit=" tokens", delay=2, leave=False))
    own = torch.tensor([prompt_ids + generated["without steering"]])

    print_fit(subject, own)
    print_features(subject, coefficients, own, console)
    screen.print_line(
        console,
        "edit",
        describe(subject, config.METHOD, coefficients) if config.STEERING_ON else "none: STEERING_ON is False",
    )
    screen.print_line(console, "prompt", repr(config.PROMPT))
    print()
    marks = [read_back(subject, coefficients, prompt_ids, ids) for ids in generated.values()]
    screen.print_side_by_side(console, list(generated), marks)
    console.print(screen.legend(console), no_wrap=True, overflow="ellipsis")
    print_figures(subject, coefficients, prompt_ids, generated)


def read_back(subject: Subject, coefficients: Coefficients, prompt_ids: list[int], ids: list[int]) -> list[screen.Mark]:
    """The texts of generated tokens, marked by the strongest of the features when read without the edit."""
    model, sae = subject.model, subject.loaded.sae
    if not ids:
        return []
    layer = subject.loaded.metadata.residual_layer
    x_TD = model.residuals(torch.tensor([prompt_ids + ids]), layer)[0, len(prompt_ids) :]
    of = torch.tensor(list(coefficients), device=x_TD.device)
    activations_TS = steering.activations_of(sae, x_TD, of)[0].cpu()
    shares = (activations_TS / subject.statistics.maximum_F[of.cpu()].clamp_min(1e-6)).amax(dim=1).tolist()
    texts = model.tokenizer.strings(prompt_ids + ids)[len(prompt_ids) :]
    return [screen.Mark(piece, screen.level_of(share)) for piece, share in zip(texts, shares, strict=True)]


def print_features(subject: Subject, coefficients: Coefficients, own: torch.Tensor, console: Console) -> None:
    """What is known of each feature; `own` (1, T) is a text of the model's, in which promotions are measured."""
    maximum_F, density_F, _ = subject.statistics
    for feature in coefficients:
        maximum, density = float(maximum_F[feature]), float(density_F[feature])
        explained = subject.explanations.get(feature)
        if explained:
            detection = explained.scores.get("detection")
            score = "" if detection is None or detection.value is None else f", detection {detection.value:.2f}"
            screen.print_line(console, f"feature {feature}", f"{explained.explanation} ({explained.explainer}{score})")
        else:
            screen.print_line(console, f"feature {feature}", "no explanation (explain.py writes them)")
        screen.print_line(console, "  fires", f"on {density:.3%} of tokens, at most {maximum:.1f}")
        if maximum > 0 and own.shape[1] > 1:
            (promotion_V,) = search.promotion(subject.model, subject.loaded, {feature: maximum}, own)
            up, down = search.extremes(subject.model, promotion_V, SHOWN)
            screen.print_line(console, "  promotes", "  ".join(map(repr, up)))
            screen.print_line(console, "  suppresses", "  ".join(map(repr, down)))


def print_figures(
    subject: Subject, coefficients: Coefficients, prompt_ids: list[int], generated: dict[str, list[int]]
) -> None:
    """What the texts cost the unsteered model, and how often the features fire when they are read back."""
    fires = "one of them fires" if len(coefficients) > 1 else "fires"
    for name, ids in generated.items():
        (found,) = sweep.measure(subject.model, subject.loaded, list(coefficients), prompt_ids, [ids], nullcontext())
        print(
            f"{name:<17} {found.cross_entropy:.2f} nats a token unsteered, {fires} on {found.rate:.0%}, "
            f"{found.repetition:.0%} repeated"
        )


# ---- a table over coefficients ----


def show_sweep(subject: Subject, coefficients: Coefficients) -> None:
    """Texts over coefficients, and the same for a random direction and for other features, as controls."""
    model, loaded, console = subject.model, subject.loaded, Console(highlight=False)
    prompt_ids, seeds = encode_prompt(model), range(config.SEED, config.SEED + config.SWEEP_SAMPLES)
    signs = {feature: c for feature, c in coefficients.items() if c}
    if not signs:
        raise SteeringError("found SWEEP with COEFFICIENT None or 0, which has no sign: expected 1 or -1")
    if len(signs) == 1:  # several keep their proportions
        signs = {feature: -1.0 if c < 0 else 1.0 for feature, c in signs.items()}
    others = dict(zip(search.other_features(subject.statistics, config.SEED, signs), signs.values(), strict=False))
    rows_SD = loaded.sae.W_dec[list(signs)]
    measure = partial(sweep.measure, model, loaded, list(signs), prompt_ids)
    texts = sweep.sample(model, prompt_ids, seeds, config.NEW_TOKENS, config.TEMPERATURE)
    unsteered = sweep.pooled(measure(texts, nullcontext()))
    screen.print_line(
        console, "edit", f"{config.METHOD}, COEFFICIENT as in the table, {config.SWEEP_SAMPLES} texts each"
    )
    screen.print_line(console, "prompt", repr(config.PROMPT))
    tables = [
        (f"feature {', '.join(map(str, signs))}", signs, None),
        ("control: random direction, the same size of edit", signs, sweep.random_directions(rows_SD, config.SEED)),
    ]
    if others:
        tables.append((f"control: at random, feature {', '.join(map(str, others))}", others, None))
    for title, of, directions_SD in tables:

        def edit_of(scales_B: torch.Tensor, of=of, directions_SD=directions_SD) -> AbstractContextManager:
            scaled = {feature: c * scales_B for feature, c in of.items()}
            return edit(subject, config.METHOD, scaled, len(prompt_ids), directions_SD)

        found = sweep.sweep(
            model, loaded, list(signs), edit_of, config.SWEEP_COEFFICIENTS, unsteered,
            prompt_ids=prompt_ids, seeds=seeds, max_tokens=config.NEW_TOKENS, temperature=config.TEMPERATURE,
        )  # fmt: skip
        found = list(tqdm(found, title, len(config.SWEEP_COEFFICIENTS), unit=" coefficients", leave=False, delay=1))
        print()
        console.print(sweep_table(subject, title, texts[0], unsteered, found))
    print(
        f"\n→ strongest setting at which the text is still fluent: at most {sweep.MOST_NATS:g} nat a token above the "
        f"model's own text, and at most {sweep.MOST_REPETITION:.0%} more of it repeated"
    )


def sweep_table(
    subject: Subject, title: str, own: list[int], unsteered: sweep.Measured, found: list[sweep.Setting]
) -> Table:
    """A row a setting, the unsteered model's first."""
    strongest = sweep.strongest_fluent(found)
    rows = [(False, "none", unsteered, own)]
    rows += [(each is strongest, f"{each.scale:g}", each.measured, each.text) for each in found]
    as_text = (
        (
            is_strongest,
            (
                name,
                f"{m.cross_entropy:.2f}",
                f"{m.kl:.2f}",
                f"{m.repetition:.0%}",
                f"{m.rate:.1%}",
                f"{m.activation:.2f}",
            ),
            subject.model.tokenizer.decode(ids),
        )
        for is_strongest, name, m, ids in rows
    )
    return screen.table(title, ("coef.", "nats", "KL", "repeated", "fires", "mean"), as_text)


# ---- conversation ----


def talk(subject: Subject, coefficients: Coefficients) -> None:
    """A conversation in the terminal; its transcript goes to RUN_DIR/chat.jsonl."""
    is_instruct = not config.ON_STANDIN and chat.has_chat_format(subject.model)
    if not is_instruct:
        print("this is no instruct model: it continues what you write")
    current = chat.Steering(coefficients, config.METHOD, on=config.STEERING_ON)
    print("/help lists the commands, Ctrl-C stops a reply, /quit or Ctrl-D ends")

    def describe_all(wanted: chat.Steering) -> str:
        steering_as = describe(subject, wanted.method, wanted.coefficients)
        return f"steering: {steering_as}" if wanted.on else f"steering is off ({steering_as})"

    chat.converse(
        subject.model,
        current,
        steered=lambda wanted, length: edit(subject, wanted.method, wanted.coefficients, length),
        find=lambda words, coefficient: choose(subject, words, coefficient),
        describe=describe_all,
        is_instruct=is_instruct,
        context=config.CHAT_CONTEXT,
        max_tokens=config.NEW_TOKENS,
        temperature=config.TEMPERATURE,
        seed=config.SEED,
        transcript=Path(config.RUN_DIR) / "chat.jsonl",
    )


# ---- the edit ----


def edit(
    subject: Subject,
    method: str,
    coefficients: dict[int, steering.Coefficient],
    prompt_length: int,
    directions_SD: torch.Tensor | None = None,
) -> AbstractContextManager:
    """The context in which the model is steered."""
    return steering.steer(
        subject.model,
        subject.loaded,
        in_unit_of(method, coefficients, subject),
        method,
        first_position=prompt_length if config.POSITIONS == "generated" else 1,
        exact=config.EXACT,
        directions_SD=directions_SD,
    )


def in_unit_of(method: str, coefficients: Coefficients, subject: Subject) -> Coefficients:
    """COEFFICIENTs as `steer` takes them: of clamp, as activations. Raises SteeringError for what cannot be steered."""
    steering.check_coefficients(subject.loaded.sae, coefficients, method)
    if method != "clamp":
        return coefficients
    return steering.times_maximum(coefficients, subject.statistics.maximum_F)


def describe(subject: Subject, method: str, coefficients: Coefficients) -> str:
    """The edit in words, with its unit."""
    in_unit = in_unit_of(method, coefficients, subject)
    where = "; on generated tokens only" if config.POSITIONS == "generated" else ""
    parts = []
    for feature, c in coefficients.items():
        if c is None:
            parts.append(f"{feature} as it is")
        elif method == "clamp":
            parts.append(f"{feature} set to {c:g} times its maximum ({in_unit[feature]:.1f})")
        elif method == "ablate":
            parts.append(f"{feature} set to 0")
        else:
            unit = "times the residual's norm" if method == "add" else "times its decoder row"
            parts.append(f"{feature} added at {c:g} {unit}")
    return f"{method}: {', '.join(parts)}{where}"


# ---- which feature ----


def choose(subject: Subject, wanted: int | str | dict | None, coefficient: float | None) -> Coefficients:
    """The features and their coefficients: numbers as they are, words looked up. Raises SteeringError."""
    wanted = parsed(wanted) if isinstance(wanted, str) else wanted
    if isinstance(wanted, dict):
        found: Coefficients = dict(wanted)
    elif type(wanted) is int:
        found = {wanted: coefficient}
    elif wanted is None or isinstance(wanted, str):
        found = {look_up(subject, wanted) if wanted else most_visible(subject): coefficient}
    else:
        raise SteeringError(f"found FEATURE_INDEX {wanted!r}: expected a number, words or several as {{12: 2, 40: -1}}")
    if not found:
        raise SteeringError("found no feature in FEATURE_INDEX: expected one or more, as in {12: 2, 40: -1}")
    steering.check_coefficients(subject.loaded.sae, found, "clamp")
    return found


def parsed(words: str) -> int | str | dict:
    """The number or the dictionary that is written there, or the words themselves. Raises SteeringError."""
    try:
        value = ast.literal_eval(words)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever else the text may be
        value = None
    if type(value) is int or isinstance(value, dict):
        return value
    if words.lstrip()[:1] in tuple("{[(") or isinstance(value, float):
        raise SteeringError(f"found FEATURE_INDEX {words!r}: expected a number, words or several as {{12: 2, 40: -1}}")
    return words


def most_visible(subject: Subject) -> int:
    """The feature that shows most in steered text, from a ranked list that is printed."""
    moderate = subject.statistics.mid_density()
    firing = (subject.statistics.maximum_F > 0).nonzero().flatten().tolist()
    kinds = {
        "explained features that fire now and then": [f for f in moderate if f in subject.explanations],
        "features that fire now and then": moderate,
        "features": firing,
    }
    kind, among = next(((kind, among) for kind, among in kinds.items() if among), ("", []))
    if not among:
        raise SteeringError("found no feature that ever fired: expected an autoencoder of this model")
    prompt_ids = encode_prompt(subject.model)
    found = search.most_visible(
        subject.model, subject.loaded, subject.statistics, among, prompt_ids, config.TEMPERATURE
    )
    print(f"of the {kind}, some that fire most in text steered with them: on so many more of a hundred tokens")
    print_found(found[:LISTED], found[0])
    return found[0].feature


def look_up(subject: Subject, words: str) -> int:
    """The feature that matches words best, from a ranked list that is printed."""
    explanations = {feature: explained.explanation for feature, explained in subject.explanations.items()}
    found = search.find(
        words, subject.model, subject.loaded, subject.statistics, explanations, lambda: held_out_rows(subject.model)
    )
    if not found:
        raise SteeringError(
            f"found no feature for {words!r}: expected words or parts of words that the model's text has"
        )
    by_explanation, by_tokens = [each for each in found if each.match], [each for each in found if not each.match]
    if by_explanation:
        how = f"by explanation, of which {len(by_explanation):,} of {len(explanations):,} match"
    elif explanations:
        how = f"none of {len(explanations):,} explanations matches: by tokens promoted and fired on"
    else:
        how = f"no explanations of it in {config.RUN_DIR} (explain.py writes them): by tokens promoted and fired on"
    print(f"features for {words!r}, {how}")
    print_found(by_explanation[:LISTED], found[0], explanations)
    if by_explanation and by_tokens:
        print("and by tokens promoted and fired on, with no explanation that matches")
    print_found(by_tokens[:LISTED], found[0])
    return found[0].feature


def print_found(found: list[search.Found], best: search.Found, explanations: Mapping[int, str] = {}) -> None:
    """A ranked list: the features, by what they are ranked, and what they are."""
    console = Console(highlight=False)
    for each in found:
        what = explanations.get(each.feature) or "promotes " + "  ".join(map(repr, each.promoted))
        screen.print_line(console, f"  {'→' if each is best else ' '} {each.feature:>6}  {each.strength:4.1f}", what)


def read_explanations(loaded: LoadedSAE) -> dict[int, Label]:
    """Those of RUN_DIR, unless the examples that they were made from say that they are of another autoencoder."""
    run_dir = Path(config.RUN_DIR)
    labels = read_labels(run_dir / "explanations.jsonl").values()
    explanations = {label.feature: label for label in labels if label.status == "ok"}
    if explanations and not examples.are_of(run_dir / "examples.safetensors", hash_of_sae(loaded.sae)):
        print(f"the explanations in {run_dir} are of another autoencoder: not used")
        return {}
    return explanations


# ---- what is known, and text ----


def statistics_of(model: lm.LanguageModel, loaded: LoadedSAE) -> features.Statistics:
    """How often and strongly features fire: from training, or measured on text once and kept in RUN_DIR."""
    known = features.saved_statistics(loaded.log_sparsity, loaded.maximum)
    if known is not None:
        return known
    path, layer = Path(config.RUN_DIR) / "feature_statistics.safetensors", loaded.metadata.residual_layer
    n_rows = max(1, MAXIMUM_TOKENS // config.CONTEXT_LENGTH)
    made_from = {
        "autoencoder": hash_of_sae(loaded.sae),
        "model": hash_of(model.name, model.block(layer).state_dict()),
        "layer": layer,
        "text": f"{config.DATA_PATH} {config.DATA_SPLIT} {config.TEXT_FIELD} {n_rows} x {config.CONTEXT_LENGTH}",
    }
    print(f"the autoencoder comes without its features' maxima: from {MAXIMUM_TOKENS:,} tokens, kept in {path}")

    def measure() -> features.Statistics:
        rows = islice(Corpus.of(config).rows(model.tokenizer, held_out=False), n_rows)
        parts = batches(rows, config.ROWS_PER_FORWARD)
        bar = cli.Progress(parts, "maxima", -(-n_rows // config.ROWS_PER_FORWARD), leave=False)
        return features.measure_statistics(loaded.sae, (residuals_of(model, tokens, layer) for tokens in bar))

    return features.cached_statistics(path, made_from, measure)


def held_out_rows(model: lm.LanguageModel) -> torch.Tensor:
    """SCAN_ROWS rows (R, T) of the held-out part, some way apart."""
    return Corpus.of(config).held_out_rows(model.tokenizer, SCAN_ROWS, config.EVALUATION_STRIDE)


def encode_prompt(model: lm.LanguageModel) -> list[int]:
    """The prompt's token ids, BOS first."""
    return [model.tokenizer.bos_id, *model.tokenizer.encode(config.PROMPT)]


def print_fit(subject: Subject, own: torch.Tensor) -> None:
    """Say so if the autoencoder does not explain the model's residuals on a text of its own (1, T)."""
    if own.shape[1] < 4:
        return  # so few have hardly any variance
    x = subject.model.residuals(own, subject.loaded.metadata.residual_layer)[0, 1:]
    explained = reconstruction(subject.loaded.sae, [x]).explained_variance
    if explained < POOR_FIT:
        print(
            f"warning: the autoencoder explains {explained:.0%} of the residuals' variance here: "
            "is it of this model and this layer?"
        )


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="NEW_TOKENS, SWEEP_SAMPLES or CHAT_CONTEXT",
    )
