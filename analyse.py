"""Are features monosemantic, and are they in superposition? `python analyse.py [NAME=value ...]`, after train.py.

Both questions are asked of the autoencoder in RUN_DIR with controls beside every number: the residual's own basis, a
rotation, principal components, random directions, and the features of an autoencoder of a model that has learned
nothing. A third is whether the model uses a concept's best feature: it is taken away, and pushed along. The concepts
are those of Python, which can be parsed, or of a file of labelled spans (CONCEPTS_PATH). The answers are printed, and
all of the figures are in RUN_DIR/analysis.json. The constants are in config.py.
"""

import config
from mistral_sae import cli, constants

if __name__ == "__main__":
    constants.start("analyse", config)  # before the imports below take their seconds

import json
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_sae.analysis.answers import (
    FEATURES,
    PROBE,
    UNTRAINED,
    codes_of,
    monosemanticity,
    searched,
    superposition,
    with_enough,
)
from mistral_sae.analysis.causal import causality
from mistral_sae.analysis.codes import Sparse
from mistral_sae.analysis.concepts import concepts_of_python, label_python, names_in, read_spans
from mistral_sae.analysis.sample import Texts, randomise, read_activity, read_texts, train_briefly
from mistral_sae.data.documents import Skipped
from mistral_sae.data.tokens import Corpus
from mistral_sae.defaults import fill
from mistral_sae.explain import cache
from mistral_sae.explain.answers import Answers, read_answers
from mistral_sae.explain.labels import set_aside
from mistral_sae.explain.report import put_answers
from mistral_sae.files import SAEError, write_text
from mistral_sae.loading import load_pair
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import hash_of_sae
from mistral_sae.sae.trainer import TrainConfig

ROWS_A_DOCUMENT = 4  # at most, so that many documents are read
SHORT = {  # names in the table
    "basis directions": "basis", "a random rotation": "rotation", "principal components": "PCA",
    "random directions": "random", "neurons of the MLP": "MLP neurons", UNTRAINED: "untrained", PROBE: "probe",
}  # fmt: skip


def main() -> None:
    """Read text, ask the questions, write the answers."""
    filled, spec, _ = fill(config)
    loaded, model = load_pair(config, spec)
    sae, layer, run_dir = loaded.sae, loaded.metadata.residual_layer, Path(filled.RUN_DIR)
    texts = with_enough(read_labelled(model))
    print(f"text      {int(texts.kept_RT.sum()):,} tokens of {len(texts.documents):,} documents")
    activity = read_activity(model, sae, layer, texts, filled.ROWS_PER_FORWARD)
    codes = codes_of(activity, sae, config.SEED)
    found = searched(codes, texts)
    is_python = config.CONCEPTS_PATH is None
    caused = causality(model, loaded, texts, activity, found, is_python, config.SEED)
    if config.CONTROL_TOKENS:
        print(f"control   an autoencoder of the same model without what it learned, {config.CONTROL_TOKENS:,} tokens")
        randomise(model, config.SEED)
        sizes = replace(TrainConfig.of(config, spec.d_model), d_hidden=sae.n_features)
        if sae.activation == "topk":
            sizes = replace(sizes, k=sae.k)
        untrained = train_briefly(model, layer, Corpus.of(config), sizes, config.CONTROL_TOKENS, filled.SHUFFLE_ROWS)
        control = read_activity(model, untrained, layer, texts, filled.ROWS_PER_FORWARD)
        codes[UNTRAINED] = Sparse(control.values_NK, control.indices_NK, untrained.n_features)
        found |= searched({UNTRAINED: codes[UNTRAINED]}, texts)
    answers: dict[str, Any] = {
        "autoencoder": hash_of_sae(sae),
        "limits": f"One model, its layer {layer}, {len(texts.documents):,} documents: elsewhere it may be otherwise.",
        "monosemantic": monosemanticity(texts, activity, codes, found, sae, config.SEED),
        "superposed": superposition(texts, activity, sae, config.SEED),
        "causal": caused,
    }
    path, text = run_dir / "analysis.json", json.dumps(answers, indent=1, allow_nan=False)
    with suppress(SAEError):  # what is damaged is written over
        if read_answers(path, sae) is None and (moved_to := set_aside(path)):
            print(f"the answers of another autoencoder are in {moved_to}")
    write_text(path, text + "\n")
    print(f"\n{table(answers['monosemantic'])}\n")
    print(f"Are features monosemantic?\n  {answers['monosemantic']['sentence']}\n")
    print(f"Are they in superposition?\n  {answers['superposed']['sentence']}\n")
    print(f"Does the model use them?\n  {caused['sentence']}\n")
    print(f"{edits_table(caused)}\n")
    print(f"figures   {path}")
    report, is_ours = run_dir / "report.html", cache.is_of(run_dir / cache.FOLDER, answers["autoencoder"])
    if not is_ours:
        print(f"report    {report} is of another autoencoder: explain.py makes one of this")
    elif put_answers(report, Answers.model_validate(answers)):
        print(f"report    {report}: the answers stand at its top")


def read_labelled(model: LanguageModel) -> Texts:
    """Rows of text whose concepts are known. Raises UserError where there is too little."""
    skipped = Skipped()
    if config.CONCEPTS_PATH is not None:
        labelled: Any = read_spans(Path(config.CONCEPTS_PATH))
        concepts = names_in(labelled)
        random.Random(config.SEED).shuffle(labelled)
    else:
        labelled = label_python(Corpus.of(config).documents(held_out=False, epochs=False), skipped)
        concepts = concepts_of_python()
    sizes = config.CONTEXT_LENGTH, config.ANALYSE_ROWS, ROWS_A_DOCUMENT
    texts = read_texts(labelled, concepts, model, *sizes, skipped)
    if skipped.count:
        print(skipped.summary())
    return texts


def table(answer: dict[str, Any]) -> str:
    """F1 of the best single direction by concept and code, the concepts that a feature tells best first."""
    codes = [FEATURES, *(name for name in answer["codes"] if name not in (FEATURES, PROBE)), PROBE]
    head = (
        "concept".ljust(30)
        + "  tokens  "
        + "  ".join(SHORT.get(name, name).rjust(11) for name in codes)
        + "  split over"
    )
    lines = [head]
    for row in sorted(answer["concepts"], key=lambda row: -row["f1"][FEATURES]):
        figures = "  ".join(f"{row['f1'][name]:11.2f}" for name in codes)
        lines.append(f"{row['concept']:30}  {row['tokens']:6,}  {figures}  {row['features']:10}")
    means = "  ".join(f"{answer['codes'][name]['mean f1']:11.2f}" for name in codes)
    lines.append(f"{'mean':30}  {'':6}  {means}")
    return "F1 of the best single direction, chosen on half of the files and scored on the other\n" + "\n".join(lines)


def edits_table(answer: dict[str, Any]) -> str:
    """What edits of the same size do, by what they write along."""
    pushed = answer["pushed"]
    lines = [
        "written along".ljust(20) + "  nats where it fires   elsewhere" + "  times in 1,000 characters" * bool(pushed)
    ]
    for kind, each in answer.get("ablated", {}).items():
        rate = f"{pushed[kind]['rate']:27.1f}" if pushed else ""
        lines.append(f"{kind:20}  {each['fires']:19.3f}  {each['elsewhere']:10.4f}{rate}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, out_of_memory="ANALYSE_ROWS or ROWS_PER_FORWARD")
