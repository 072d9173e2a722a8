"""What the page knows: a model with an autoencoder, and what earlier runs found out about its features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import STANDIN_NAME, UserError
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.index import index_of
from mistral_sae.explain.report import SHARES, command, main_score
from mistral_sae.explain.types import INTERVALS, Label
from mistral_sae.sae.checkpoint import hash_of_sae
from mistral_sae.steer.chat import has_chat_format
from mistral_sae.steer.steering import Subject

# Constants that the page's form begins with, by their names in demo.py
FORM = ("PROMPT", "NEW_TOKENS", "TEMPERATURE", "SEED", "METHOD", "POSITIONS")


class Known(NamedTuple):
    """All that requests are answered from."""

    subject: Subject
    name: str  # the model's, for people
    labels: Mapping[int, Label]
    records: FeatureRecords | None  # None without activations of a corpus
    listed: Mapping[str, Any]  # the columns of the list, of all features, and what the page needs beside them
    context: int  # tokens of a row in which a text is read
    most_tokens: int  # of a prompt with what continues it
    form: Mapping[str, Any]  # what the page's form begins with, by FORM
    is_instruct: bool
    waiting: dict[Any, Any]  # texts that can be made with others, and with which; the engine's thread alone looks

    def check_length(self, prompt: int, more: int) -> None:
        """Raise UserError where a prompt and what is to continue it are too long."""
        if prompt + more > self.most_tokens:
            found = f"found a prompt of {prompt:,} tokens and {more:,} to continue it"
            raise UserError(f"{found}, expected at most {self.most_tokens:,} together: see CHAT_CONTEXT")


def known_of(constants: Any, subject: Subject, labels: Mapping[int, Label]) -> Known:
    """What is known with constants such as config.py's: the activations that explain.py left, if there are any."""
    model, loaded, statistics, _ = subject
    activations = cache.open_of(Path(constants.RUN_DIR) / cache.FOLDER, hash_of_sae(loaded.sae))
    records = None
    if activations is None:
        print("passages  none: explain.py reads a corpus for them")
    else:
        every = range(loaded.sae.n_features)
        settings = Settings.noted(Path(constants.RUN_DIR) / cache.FOLDER, constants)
        records = FeatureRecords(activations, every, model, loaded.sae, settings, at_once=1)
        statistics = activations.statistics()
    index = index_of(model, loaded.sae, statistics, activations)
    labels = {feature: label for feature, label in labels.items() if feature < loaded.sae.n_features}
    for feature, label in labels.items():
        index["explanation"][feature], index["score"][feature] = label.explanation, main_score(label)
        index["concept"][feature] = label.concept and label.concept.f1
    demo, is_instruct = command("demo.py", constants), not constants.ON_STANDIN and has_chat_format(model)
    return Known(
        subject=subject,
        name=STANDIN_NAME if constants.ON_STANDIN else model.name,
        labels=labels,
        records=records,
        listed={**index, **SHARES, "records": len(index["feature"]), "intervals": INTERVALS, "demo": demo},
        context=constants.CONTEXT_LENGTH,
        most_tokens=constants.CHAT_CONTEXT,
        form={name: getattr(constants, name) for name in FORM},
        is_instruct=is_instruct,
        waiting={},
    )
