"""Explain the features of a sparse autoencoder: `python explain.py [NAME=value ...]`.

A corpus gives the examples that activate each feature, an explainer says in words what they have in common, a scorer
how well the words tell where the feature fires on other documents. It all ends in RUN_DIR/explanations.jsonl and
RUN_DIR/report.html. The constants are in config.py. No reply that a run has received is asked for again by the next.
"""

import config
from mistral_sae import cli, constants

if __name__ == "__main__":
    constants.start("explain", config)  # the first line, before the imports below take their seconds

import asyncio
import atexit
import gc
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from mistral_sae.analysis.naming import Named, labels_of, read_concepts
from mistral_sae.defaults import Filled, fill
from mistral_sae.distributed import joined
from mistral_sae.explain import cache, pipeline, prompts, report
from mistral_sae.explain.client import Client
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.index import index_of
from mistral_sae.explain.journal import Budget, DryRun, Journal, Prices
from mistral_sae.explain.labels import merge_labels, parse_select, read_labels, set_aside, write_labels
from mistral_sae.explain.local_client import MODEL_CONTEXT, LocalClient
from mistral_sae.explain.reading import Reading, read_corpus, rows_of, strongest
from mistral_sae.explain.server import Server
from mistral_sae.explain.types import INTERVALS, Completer, Label
from mistral_sae.files import locked
from mistral_sae.loading import load_pair, sae_source
from mistral_sae.model.language_model import LanguageModel, ModelSpec, device_and_dtype
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, hash_of_sae
from mistral_sae.sae.memory import Needs, explaining_needs

SHOWN_FEATURES = 10  # of a token of TEXT
REPLY = 2000  # tokens of a reply and of what is said around the passages, which have marks: for the plan of memory
WHO = config.EXPLAINER or ("openai" if config.OPENAI_API_KEY or config.OPENAI_BASE_URL else "offline")
EXPLAINER_NAME = config.OPENAI_MODEL or "" if WHO == "openai" else WHO  # as its labels have it


def main() -> None:
    """Load, read the corpus, choose features, explain, score, report."""
    if WHO == "openai":
        cli.expect("OPENAI_MODEL", config.OPENAI_MODEL, config.OPENAI_MODEL, "the server's name for its model")
        server()  # which checks the address and the key
    selected = parse_select(config.SELECT)
    filled, spec, _ = fill(config)
    run_dir = Path(filled.RUN_DIR)
    sae_source(config)  # or a mistaken RUN_DIR would be made
    if config.TEXT is not None:
        return show_text(config.TEXT, filled, spec)
    alone = nullcontext("") if cli.rank() else locked(run_dir)
    with alone as note, joined(None, device_and_dtype(config.DEVICE, config.DTYPE)[0].type) as mesh:
        config.DEVICE = mesh.device or config.DEVICE
        if note:
            print(note)
        loaded, model = open_pair(filled, spec)
        selected.check(loaded.sae.n_features)  # before the corpus is read
        gc.freeze()  # what is loaded stays: without this the garbage collector takes as long as counting offline
        atexit.register(gc.unfreeze)  # libraries such as triton complain of what is left at the end
        reading, settings, folder = Reading.of(config), Settings.of(config), run_dir / cache.FOLDER
        corpus, path = reading.corpus.check(), run_dir / "explanations.jsonl"
        print(f"corpus    {corpus}")
        if not (config.DRY_RUN or cli.rank()):
            set_aside_others(path, folder, loaded.sae)  # before there is a cache of this one
        activations = read_corpus(folder, reading, model, loaded, keep_other=config.DRY_RUN, ranks=mesh.ranks)
        if cli.rank():  # which have read their share
            return
        chosen = selected.choose(activations.counts_F, config.SEED)
        concepts = read_concepts(activations, reading.corpus, model.tokenizer) if WHO == "offline" else None
        best = concepts.best() if concepts else {}
        beside = best.keys() - chosen if selected.how == "random" else ()
        labelled = sorted({*chosen, *beside})
        records = FeatureRecords(activations, labelled, model, loaded.sae, settings, concepts.of if concepts else None)
        if config.DRY_RUN:
            label(records, model, run_dir, best)
            return
        run = report.run_of(config, model_name(model), loaded, corpus, activations)  # before anything is paid for
        labels, broken = label(records, model, run_dir, best)
        labels = {f: each._replace(is_beside=f in beside) for f, each in labels.items()}
        are_new = cache.noted(folder) != settings._asdict()
        every, moved_to = merge_labels(path, labels, of_other_examples=are_new)
        if moved_to:
            print(f"the explanations of earlier runs are in {moved_to}")
        cache.note(folder, settings._asdict())  # now that labels of other examples are away, and before there are new
        write_labels(path, every.values())
        if list(every) != labelled:
            records = FeatureRecords(activations, list(every), model, loaded.sae, settings)
        others = index_of(model, loaded.sae, activations.statistics(), activations, without=every)
        with cli.Progress(records, "report", unit=" features") as features:
            report.write_report(run_dir / "report.html", run, features, every, others)
    print_results(labels, len(every), run_dir)
    if broken:
        raise cli.Failed(f"the run was not finished: {broken}")


def open_pair(filled: Filled, spec: ModelSpec) -> tuple[LoadedSAE, LanguageModel]:
    """The autoencoder and what of the model is needed, after the plan of their memory; UserError if it has no room."""

    def needed(sae: SparseAutoencoder, last_layer: int | None, dtype: torch.dtype) -> Needs:
        tokens = filled.ROWS_PER_FORWARD * config.CONTEXT_LENGTH
        passages = prompts.TOP + min(prompts.SPREAD, INTERVALS * config.EXAMPLES_PER_INTERVAL)
        passage = config.TOKENS_BEFORE + 1 + config.TOKENS_AFTER
        asked = min(spec.context_length or MODEL_CONTEXT, 2 * passages * passage + REPLY) if WHO == "mistral" else 0
        options = {"tokens": tokens, "shard_tokens": cache.SHARD_TOKENS, "reply_tokens": asked}
        return explaining_needs(sae, spec, last_layer=last_layer, dtype=dtype, **options)

    # Only its own explanations need logits of a text; the report wants those of decoder rows, by the head alone
    return load_pair(config, spec, whole=WHO == "mistral", needed=needed, advice="lower ROWS_PER_FORWARD")


def set_aside_others(path: Path, folder: Path, sae: SparseAutoencoder) -> None:
    """Set explanations aside, and say where, if the cache beside them is of another autoencoder."""
    if not cache.is_of(folder, hash_of_sae(sae)) and (moved_to := set_aside(path)):
        print(f"the explanations of another autoencoder are in {moved_to}")


def model_name(model: LanguageModel) -> str:
    """The model's name, for people."""
    return cli.STANDIN_NAME if config.ON_STANDIN else model.name


# ---- explanations and scores ----


def label(
    records: FeatureRecords, model: LanguageModel, run_dir: Path, best: Mapping[int, Named]
) -> tuple[dict[int, Label], str]:
    """A label for each of the features, none with DRY_RUN; and why the server answers no more, if that is so."""
    if WHO == "offline":
        return label_offline(records, best), ""
    # The completions of the loaded model are kept apart, as they count towards no budget
    journal = Journal(run_dir / ("completions.jsonl" if WHO == "openai" else "completions-mistral.jsonl"))
    known = f", {len(journal):,} replies are in {journal.path}" if len(journal) else ""
    if config.DRY_RUN:
        keys = server().keys if WHO == "openai" else LocalClient(model, journal).keys
        dry = DryRun(prompts.dry_reply, keys, journal, budget(journal) if WHO == "openai" else Budget(journal))
        asyncio.run(ask(records, dry))
        print(f"explainer {EXPLAINER_NAME}: {len(records):,} features need {dry.summary}; none was sent")
        return {}, ""
    if WHO == "mistral":
        print(f"explainer {WHO}: the loaded model itself{known}")
        return asyncio.run(ask(records, LocalClient(model, journal))), ""
    why = "" if config.EXPLAINER else "; since a key or a base URL is set (EXPLAINER=offline asks nobody)"
    print(f"explainer {EXPLAINER_NAME} at {server().address}{known}{why}")
    if config.MAX_DOLLARS is not None and journal.unpriced:
        print(f"MAX_DOLLARS leaves out {journal.unpriced:,} tokens of earlier runs, whose prices were not known")
    return asyncio.run(ask_server(records, journal))


def label_offline(records: FeatureRecords, best: Mapping[int, Named]) -> dict[int, Label]:
    """Labels by counting, without a model."""
    why = "" if config.EXPLAINER else ", since neither OPENAI_API_KEY nor OPENAI_BASE_URL is set"
    print(f"explainer offline: counting, without a model{why}")
    if config.DRY_RUN:
        print(f"{len(records):,} features would be explained without a request")
        return {}
    return labels_of(records, best, config.SEED)


def server() -> Server:
    """The server that is asked."""
    return Server(
        model=config.OPENAI_MODEL or "",
        base_url=config.OPENAI_BASE_URL,
        key=config.OPENAI_API_KEY,
        sampling=config.SAMPLING,
        concurrency=config.CONCURRENCY,
        timeout=config.REQUEST_TIMEOUT,
        deadline=config.REQUEST_DEADLINE,
        longest_reply=config.MAX_REPLY_TOKENS,
    )


def budget(journal: Journal) -> Budget:
    """What asking the server may cost, if its prices are known."""
    read, written = config.PROMPT_DOLLARS, config.COMPLETION_DOLLARS
    prices = None if read is None or written is None else Prices(read, written)
    return Budget(journal, prices, config.MAX_DOLLARS, config.MAX_API_TOKENS)


async def ask_server(records: FeatureRecords, journal: Journal) -> tuple[dict[int, Label], str]:
    """Labels by a server, each of whose completions is in the journal before it is used; and as `label`."""
    async with Client(server(), journal, budget(journal)) as client:
        try:
            labels = await ask(records, client)
        finally:
            print(*client.report, sep="\n")
        return labels, client.stopped if client.is_broken else ""


async def ask(records: FeatureRecords, completer: Completer) -> dict[int, Label]:
    """Explain all, then score all. A budget that is reached ends it early: the features that were left say so."""
    load, shown = records.__getitem__, (lambda: completer.progress) if isinstance(completer, Client) else str
    with cli.Progress(desc="explaining", total=len(records), unit=" features") as progress:
        async with progress.showing(shown):
            explanations = await pipeline.explain_all(
                records.features, load, completer, in_flight=config.CONCURRENCY, after_each=progress.update
            )
    with cli.Progress(desc="scoring", total=len(records), unit=" features") as progress:
        async with progress.showing(shown):
            return await pipeline.score_all(
                explanations, load, completer, explainer=EXPLAINER_NAME,
                methods=constants.words_of(config.SCORERS), seed=config.SEED,
                in_flight=config.CONCURRENCY, after_each=progress.update,
            )  # fmt: skip


# ---- what comes of it ----


def show_text(text: str, filled: Filled, spec: ModelSpec) -> None:
    """Write the page of TEXT: the strongest features of each of its tokens."""
    run_dir = Path(filled.RUN_DIR)
    loaded, model = open_pair(filled, spec)
    folder, autoencoder = run_dir / cache.FOLDER, hash_of_sae(loaded.sae)
    rows = rows_of(model, text, config.CONTEXT_LENGTH)
    ids = [id for row in rows for id in row[1:]]
    features = [each for row in rows for each in strongest(model, loaded, row, SHOWN_FEATURES)]
    tokens = list(zip(model.tokenizer.strings(ids), features, strict=True))
    labels = read_labels(run_dir / "explanations.jsonl") if cache.is_of(folder, autoencoder) else {}
    activations = cache.open_of(folder, autoencoder)
    fired = sorted({feature for each in features for feature, _ in each})
    settings = Settings.noted(folder, config)
    records = FeatureRecords(activations, fired, model, loaded.sae, settings) if activations else None
    page, layer = run_dir / "text.html", loaded.metadata.residual_layer
    known = map(records.brief, fired) if records else ()
    report.write_text_page(page, model_name(model), layer, tokens, labels, known)
    missing = [what for what, found in {"explanations": labels, "passages": activations}.items() if not found]
    hint = f"; run explain.py without TEXT for {' and '.join(missing)}" if missing else ""
    print(f"page      {page}: {len(tokens):,} tokens{hint}")


def print_results(labels: dict[int, Label], n_labels: int, run_dir: Path) -> None:
    """How many features have a label, how good the labels are, and where they are; Failed if too few have one."""
    path = run_dir / "explanations.jsonl"
    earlier = f", beside {n_labels - len(labels):,} of earlier runs" if n_labels > len(labels) else ""
    print(f"\nlabels    {path}{earlier}")
    print(f"report    {run_dir / 'report.html'}\n")
    print(*pipeline.summary(labels.values()), sep="\n")
    failed = [label for label in labels.values() if pipeline.has_failed(label)]
    if len(failed) > config.MAX_FAILED_SHARE * len(labels):
        again = any(map(pipeline.is_worth_asking_again, failed))
        raise cli.Failed(
            f"{len(failed):,} of {len(labels):,} features have no label or no score, more than MAX_FAILED_SHARE, "
            f"{config.MAX_FAILED_SHARE:.0%}: {path} says why"
            + ("; start again to ask for what got no answer" if again else "")
        )


if __name__ == "__main__":
    cli.run(main, out_of_memory="ROWS_PER_FORWARD", stopped="early: started again, it goes on from what is saved")
