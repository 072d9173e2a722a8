"""Share a run: `python share.py PUSH_TO=owner/name`, or `python share.py FORM=sparsify [TO=folder]`.

PUSH_TO sends the autoencoders of RUN_DIR to the Hugging Face hub, with a model card; FORM writes them, their features
or one feature's direction in the form of another tool. DRY_RUN=1 prints the card, or where the form would be, and no
more. The constants are in config.py.
"""

import config
from mistral_sae import cli, constants

if __name__ == "__main__":
    constants.start("share", config)  # before the imports below take their seconds

from pathlib import Path

from mistral_sae.defaults import Filled, fill
from mistral_sae.explain import cache
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.labels import parse_select, read_labels
from mistral_sae.explain.reading import Reading
from mistral_sae.loading import load_pair, sae_source
from mistral_sae.model.language_model import ModelSpec
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.share import forms, hub
from mistral_sae.steer.steering import Edit, Subject, statistics_of


def main() -> None:
    """Push, or write one form."""
    if config.PUSH_TO is None and config.FORM is None:
        raise cli.UserError(
            "found neither PUSH_TO nor FORM: expected PUSH_TO=owner/name, or FORM=sparsify for instance"
        )
    if config.PUSH_TO is not None:
        hub.check_repository(config.PUSH_TO)
        if config.SAE_PATH is not None:
            raise cli.UserError("found PUSH_TO with SAE_PATH: expected one of them, as what is in RUN_DIR is pushed")
    filled, spec, _ = fill(config)
    if config.PUSH_TO is not None:
        push(Path(filled.RUN_DIR), config.PUSH_TO)
    if config.FORM is not None and config.DRY_RUN:
        sae_source(config)  # raises where there is nothing to write
        print(f"form      {config.FORM}, into {target(filled)}\nnothing was written")
    elif config.FORM == "sparsify":
        loaded = load_sae(sae_source(config), hook_name=config.HOOK_NAME)
        print(f"folder    {forms.write_sparsify(target(filled), loaded)}")
        if loaded.sae.normalize != "none":
            print(
                f"note      it is for residuals after {loaded.sae.normalize}, which sparsify has not (docs/sharing.md)"
            )
    elif config.FORM == "neuronpedia":
        write_features(filled, spec)
    elif config.FORM is not None:
        write_direction(filled, spec)


def push(run_dir: Path, repository: str) -> None:
    """Send the autoencoders of a RUN_DIR to the hub, or print the card with DRY_RUN."""
    members = hub.members_of(run_dir)
    files = hub.files_of(members)
    readme = hub.card(repository, members, config.MISTRAL_MODEL_PATH)
    for name, path in files.items():
        print(f"file      {name}, {cli.size_of(path.stat().st_size)}")
    if config.DRY_RUN:
        print(f"\n{readme}\nnothing was sent")
        return
    print(f"pushed    {hub.push(repository, files, readme)}")
    print(f"load      SAE_PATH={repository}/{members[0].name}")


def target(filled: Filled) -> Path:
    """The folder or file where the form is written: TO, or below RUN_DIR."""
    suffix = {"control-vector": ".gguf", "lm-eval": ".pt"}.get(config.FORM or "", "")
    return Path(config.TO) if config.TO else Path(filled.RUN_DIR) / "shared" / f"{config.FORM}{suffix}"


def write_features(filled: Filled, spec: ModelSpec) -> None:
    """Write the explained features, or SELECT's where none is, from the cache that explain.py left."""
    run_dir = Path(filled.RUN_DIR)
    loaded, model = load_pair(config, spec, whole=False)
    reading = Reading.of(config)
    described = cache.made_from(model, loaded.sae, loaded.metadata.residual_layer, reading.described())
    activations, why = cache.open_cache(run_dir / cache.FOLDER, described)
    if activations is None:
        found = why.split(":")[0] or f"found no activations in {run_dir}"
        raise cli.UserError(f"{found}: expected those of this autoencoder and corpus; run explain.py first")
    labels = read_labels(run_dir / "explanations.jsonl")
    chosen = list(labels) or parse_select(config.SELECT).choose(activations.counts_F, config.SEED)
    settings = Settings.noted(run_dir / cache.FOLDER, config)
    records = FeatureRecords(activations, chosen, model, loaded.sae, settings)
    corpus = config.DATA_PATH, activations.rows, activations.row_tokens
    to, n_features = target(filled), loaded.sae.n_features
    with cli.Progress(records, "features", unit=" features") as features:
        *files, explanations = forms.write_dashboards(
            to, features, labels, loaded.metadata, n_features=n_features, corpus=corpus
        )
    print(f"features  {to}: {len(chosen):,} in {len(files)} files of SAE Dashboard")
    print(f"explained {explanations}")


def write_direction(filled: Filled, spec: ModelSpec) -> None:
    """Write what FEATURE_INDEX at COEFFICIENT times its maximum adds, as llama.cpp or lm-eval takes it."""
    feature, times = config.FEATURE_INDEX, 1.0 if config.COEFFICIENT is None else config.COEFFICIENT
    if not isinstance(feature, int):
        raise cli.UserError(f"FEATURE_INDEX is {cli.quoted(feature)}: expected a feature's number")
    loaded, model = load_pair(config, spec, whole=False)
    edit, subject = Edit({feature: times}), Subject(model, loaded, statistics_of(model, loaded, filled), {})
    print(f"feature   {edit.describe(subject)}")
    to, layer = target(filled), loaded.metadata.residual_layer
    vector_D = forms.steering_vector(subject, edit, config.PROMPT)
    print(f"vector    norm {float(vector_D.norm()):.3g}, added to the output of layer {layer}")
    if config.FORM == "control-vector":
        forms.write_control_vector(to, vector_D, layer)
        print(f"file      {to}: llama-cli -m MODEL.gguf --control-vector {to}")
    else:
        forms.write_steered(to, vector_D, layer)
        print(f"file      {to}: lm_eval --model steered --model_args pretrained=MODEL,steer_path={to}")


if __name__ == "__main__":
    cli.run(main, out_of_memory="ROWS_PER_FORWARD")
