"""Steer a Mistral with a feature: `python demo.py [NAME=value ...]`.

Prints the model's own continuation of a prompt beside the steered one. SWEEP=1 prints a table over coefficients
instead, CHAT=1 starts a conversation, SERVE=1 a page in a browser. The constants are in config.py.
"""

import config
from mistral_sae import cli, constants

if __name__ == "__main__":
    constants.start("demo", config)  # before the imports below take their seconds

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mistral_sae import live
from mistral_sae.analysis.naming import shares_of
from mistral_sae.cli import Progress
from mistral_sae.data.activations import residuals_of
from mistral_sae.data.tokens import Corpus
from mistral_sae.defaults import fill
from mistral_sae.explain.types import Label
from mistral_sae.loading import load_pair, read_explanations
from mistral_sae.model.language_model import ModelSpec
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.evaluate import reconstruction
from mistral_sae.sae.memory import Needs, steering_needs
from mistral_sae.steer import chat, display, search, sweep
from mistral_sae.steer.display import print_line
from mistral_sae.steer.effect import Class, share_of
from mistral_sae.steer.steering import Edit, SteeringError, Subject, statistics_of

POOR_FIT = 0.5  # explained variance below which an autoencoder is not one of this model's
SHOWN = 10  # tokens that a feature raises, or lowers
# At most, at each strength, where features or coefficients are looked for; a larger model takes its time for a token
TRIED_TEXTS, TRIED_TOKENS = 4, 64 if config.ON_STANDIN else 40


def main() -> None:
    """Load the autoencoder and the model, choose the feature; then texts, a table or a conversation."""
    filled, spec, _ = fill(config)
    advice = "lower NEW_TOKENS, SWEEP_SAMPLES or CHAT_CONTEXT"
    loaded, model = load_pair(config, spec, needed=partial(needed, spec), advice=advice)
    run_dir = Path(filled.RUN_DIR)
    statistics = statistics_of(model, loaded, filled)
    labels, explanations = read_explanations(loaded, run_dir)
    subject = Subject(model, loaded, statistics, explanations)
    if config.SERVE:
        return live.serve(config, subject, labels)
    edit = Edit({}, config.METHOD, config.POSITIONS == "generated", config.EXACT)
    is_instruct = config.CHAT and not config.ON_STANDIN and chat.has_chat_format(model)
    searched = searching(subject, labels, chat_format=is_instruct)
    find = partial(search.choose, searched)
    edit, begun = search.choose_and_begin(searched, edit, config.FEATURE_INDEX, config.COEFFICIENT)
    edit.in_units_of_steer(subject)  # what cannot be steered is said before anything is generated
    if config.CHAT:
        return talk(subject, edit, find, run_dir, is_instruct)
    print_line("edit", edit.describe(subject) if config.STEERING_ON else "none: STEERING_ON is False")
    if config.SWEEP:
        show_sweep(subject, edit, searched.strengths)
    else:
        show_texts(subject, edit, searched.concepts, begun if config.STEERING_ON else ())


def needed(spec: ModelSpec, sae: SparseAutoencoder, _: int | None, dtype: torch.dtype) -> Needs:
    """The memory of the texts that are made together."""
    length, texts = len(config.PROMPT) + 1 + config.NEW_TOKENS, max(TRIED_TEXTS, config.SWEEP_SAMPLES)
    made = texts * sweep.settings_at_once(texts) * length
    read = texts * sweep.settings_read_at_once(texts, length, spec.vocab_size) * length
    conversations = 2 if config.SERVE else int(config.CHAT)
    made = max(made, conversations * config.CHAT_CONTEXT)
    return steering_needs(sae, spec, dtype=dtype, tokens=made, read=read)


# ---- which feature ----


def searching(subject: Subject, labels: Mapping[int, Label], *, chat_format: bool) -> search.Search:
    """What features and coefficients are found with: a few texts that continue the prompt, or reply to it."""

    def rows(n: int) -> torch.Tensor:
        return Corpus.of(config).held_out_rows(subject.model.tokenizer, n, config.EVALUATION_STRIDE)

    tried = trials_of(subject, TRIED_TEXTS)._replace(max_tokens=min(TRIED_TOKENS, config.NEW_TOKENS))
    if chat_format:
        ids = subject.model.tokenizer.chat([{"role": "user", "content": config.PROMPT}])
        tried = tried._replace(prompt_ids=ids)
    shares = shares_of(labels, subject.model.tokenizer, tried.prompt_ids)
    shows_text = config.STEERING_ON and not (config.CHAT or config.SWEEP)
    shown_tokens = config.NEW_TOKENS if shows_text else 0
    return search.Search(subject, tried, rows, config.SWEEP_COEFFICIENTS, shares, shown_tokens)


def trials_of(subject: Subject, n_texts: int) -> sweep.Trials:
    """So many texts that continue the prompt, the first of which is the one that is shown."""
    seeds = range(config.SEED, config.SEED + n_texts)
    prompt_ids = subject.model.encode(config.PROMPT)
    return sweep.Trials(subject.model, subject.loaded, prompt_ids, seeds, config.NEW_TOKENS, config.TEMPERATURE)


# ---- side by side ----


def show_texts(subject: Subject, edit: Edit, shares: Mapping[int, Class], begun: Sequence[list[int]]) -> None:
    """The model's own continuation beside the steered one, which may be begun, and what they are."""
    model, console = subject.model, Console(highlight=False)
    prompt_ids, names = model.encode(config.PROMPT), ("without steering", "with steering")
    of_second = edit.alone_in(1, rows=2).context(subject, len(prompt_ids)) if config.STEERING_ON else nullcontext()
    progress = partial(Progress, desc="the two texts", total=config.NEW_TOKENS, unit=" tokens", leave=False)
    settings = config.NEW_TOKENS, config.TEMPERATURE, progress, begun
    with of_second:  # made together, which costs little more than one
        texts = model.sample(prompt_ids, 2 * [config.SEED], *settings)
    generated = dict(zip(names, texts, strict=True))
    own = torch.tensor([prompt_ids + generated["without steering"]])

    print_fit(subject, own)
    for feature in edit.coefficients:
        print_feature(subject, feature, own)
    print_line("prompt", repr(config.PROMPT))
    print()
    marks = [marks_of(subject, edit, prompt_ids, ids) for ids in generated.values()]
    display.print_side_by_side(console, list(generated), marks)
    console.print(display.legend(console), no_wrap=True, overflow="ellipsis")
    fires = "one of them fires" if len(edit.coefficients) > 1 else "fires"
    for name, ids in generated.items():
        (found,) = sweep.measure(model, subject.loaded, list(edit.coefficients), prompt_ids, [ids])
        print(
            f"{name:<17} {found.cross_entropy:.2f} nats a token unsteered, {fires} on {found.rate:.0%}, "
            f"{found.repetition:.0%} repeated"
        )
    for feature in edit.coefficients.keys() & shares:
        counted = " → ".join(f"{share_of([ids], shares[feature]):.0%}" for ids in generated.values())
        print(f"{subject.explanations[feature].text}: {counted} of the tokens, read as Python")


def print_fit(subject: Subject, own: torch.Tensor) -> None:
    """Say so if the autoencoder does not explain the model's residuals on a text of its own (1, T)."""
    if own.shape[1] < 4:
        return  # so few have hardly any variance
    x = residuals_of(subject.model, own, subject.loaded.metadata.residual_layer)
    explained = reconstruction(subject.loaded.sae, [x]).explained_variance
    if explained < POOR_FIT:
        print(
            f"warning: the autoencoder explains {explained:.0%} of the residuals' variance here: "
            "is it of this model and this layer?"
        )


def print_feature(subject: Subject, feature: int, own: torch.Tensor) -> None:
    """What is known of a feature; what it raises is measured on `own` (1, T), a text of the model's."""
    model, loaded, statistics, explanations = subject
    maximum, density = float(statistics.maximum_F[feature]), float(statistics.density_F[feature])
    text, source = explanations.get(feature, ("no explanation", "explain.py writes them"))
    print_line(f"feature {feature}", f"{text} ({source})")
    print_line("  fires", f"on {density:.3%} of tokens, at most {maximum:.1f}")
    if maximum > 0 and own.shape[1] > 1:
        (change_V,) = search.changes_of(model, loaded, {feature: maximum}, own).logits_NV
        raised, lowered = search.extremes(model, change_V, SHOWN)
        print_line("  raises when steered", "  ".join(map(repr, raised)))
        print_line("  lowers when steered", "  ".join(map(repr, lowered)))


def marks_of(subject: Subject, edit: Edit, prompt_ids: list[int], ids: list[int]) -> list[display.Mark]:
    """The texts of generated tokens, marked by the strongest of the features when read without the edit."""
    shares = sweep.shares_of_maxima(subject, list(edit.coefficients), prompt_ids, ids)
    pieces = subject.model.tokenizer.strings(prompt_ids + ids)[len(prompt_ids) :]
    return [display.Mark(text, display.level_of(share)) for text, share in zip(pieces, shares, strict=True)]


# ---- a table over coefficients ----


def show_sweep(subject: Subject, edit: Edit, strengths: Callable[[list[Edit]], list[list[float]]]) -> None:
    """Figures and texts over coefficients, and the same for a random direction and other features, as controls."""
    console, trials = Console(highlight=False), trials_of(subject, config.SWEEP_SAMPLES)
    unit = edit.unit()
    features = list(unit.coefficients)
    if not features:
        raise SteeringError(f"found SWEEP over {dict(edit.coefficients)}, where nothing has a sign: expected 1 or -1")
    own = trials.unsteered(features)
    print_line("prompt", f"{config.PROMPT!r}, {config.SWEEP_SAMPLES} texts each")
    (scales,) = strengths([unit])
    for title, each, directions_SD in sweep.with_controls(subject, unit, config.SEED):

        def context(scales_B: list[float], each=each, directions_SD=directions_SD) -> AbstractContextManager:
            return each.times(torch.tensor(scales_B)).context(subject, len(trials.prompt_ids), directions_SD)

        steered = trials.steered(scales, context, lambda _: features)
        found = list(Progress(steered, title, len(scales), unit=" coefficients", leave=False))
        strongest = sweep.strongest_fluent(scales, found, own)
        named = zip(["none", *(f"{scale:g}" for scale in scales)], [own, *found], strict=True)
        rows = [(name, trial.pooled, trials.text_of(trial.texts[0])) for name, trial in named]
        print()
        display.print_sweep(console, title, rows, marked=None if strongest is None else f"{strongest:g}")
    print(
        f"\n→ strongest setting at which texts are still fluent, together and the first alone: at most "
        f"{sweep.MOST_NATS:g} nat a token above the model's own, and at most {sweep.MOST_REPETITION:.0%} more repeated"
    )


# ---- conversation ----


def talk(subject: Subject, edit: Edit, find: chat.Find, run_dir: Path, is_instruct: bool) -> None:
    """A conversation in the terminal; its transcript goes to RUN_DIR/chat.jsonl."""
    if not is_instruct:
        print("this is no instruct model: it continues what you write")
    conversation = chat.Conversation(
        subject,
        edit,
        find,
        coefficient=config.COEFFICIENT,
        context=config.CHAT_CONTEXT,
        sampling=chat.Sampling(config.NEW_TOKENS, config.TEMPERATURE, config.SEED),
        transcript=run_dir / "chat.jsonl",
        is_instruct=is_instruct,
    )
    conversation.is_on = config.STEERING_ON
    print("/help lists the commands, Ctrl-C stops a reply, /quit or Ctrl-D ends")
    conversation.run()


if __name__ == "__main__":
    cli.run(main, out_of_memory="NEW_TOKENS, SWEEP_SAMPLES or CHAT_CONTEXT")
