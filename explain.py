"""Explain the features of a sparse autoencoder: `python explain.py [NAME=value ...]`.

A corpus gives the examples that activate each feature, an explainer says in words what they have in common, a scorer
how well the words tell where the feature fires on other documents. It all ends in RUN_DIR/explanations.jsonl and
RUN_DIR/report.html. The constants are in config.py. No reply that a run has received is asked for again by the next.
"""

import config
from mistral_sae import cli

if __name__ == "__main__":
    cli.start("explain", config)  # the first line, before the imports below take their seconds

import asyncio
import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_sae.data.documents import Skipped
from mistral_sae.data.tokens import Corpus, Row, prefetch
from mistral_sae.explain import cache, offline, pipeline, prompts, report
from mistral_sae.explain.cache import Cache
from mistral_sae.explain.client import Client, LocalClient, Server
from mistral_sae.explain.examples import FeatureRecords, Settings
from mistral_sae.explain.journal import Budget, DryRun, Journal, Prices
from mistral_sae.explain.labels import merge_labels, parse_select, read_labels, write_labels
from mistral_sae.explain.types import Completer, Label
from mistral_sae.files import locked
from mistral_sae.loading import load_pair, sae_source
from mistral_sae.model import language_model as lm
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.sae.features import decoder_geometry

SHOWN_FEATURES = 10  # of a token of TEXT
FEW_DOCUMENTS = 30  # below which a feature has hardly ten examples to explain it from


def main() -> None:
    """Load, collect, explain, score, report."""
    run_dir = Path(config.RUN_DIR)
    if explainer() == "openai":
        cli.expect("OPENAI_MODEL", config.OPENAI_MODEL, config.OPENAI_MODEL, "the server's name for its model")
        server()  # which checks the address and the key
    selected = parse_select(config.SELECT)
    sae_source(config)  # or a mistaken RUN_DIR would be made
    if config.TEXT is not None:
        return show_text(run_dir)
    with locked(run_dir) as note:  # first, so that a second run is refused before it has loaded a model
        if note:
            print(note)
        loaded, model = opened()
        selected.check(loaded.sae.n_features)  # before the corpus is read
        gc.freeze()  # what is loaded stays: without this the garbage collector takes as long as counting offline
        activations, settings = read_corpus(model, loaded, run_dir), settings_of_examples()
        chosen = selected.choose(activations.counts_F, config.SEED)
        records = FeatureRecords(activations, chosen, model, loaded.sae, settings)
        labels, broken = label(records, model, run_dir)
        if config.DRY_RUN:
            return
        path = run_dir / "explanations.jsonl"
        are_new = cache.noted(run_dir / cache.FOLDER) != settings._asdict()
        every, moved_to = merge_labels(path, labels, of_other_examples=are_new)
        if moved_to:
            print(f"the explanations of earlier runs are in {moved_to}")
        write_labels(path, every.values())
        cache.note(run_dir / cache.FOLDER, settings._asdict())
        run = about_run(loaded, model, Corpus.of(config).check(), activations.tokens, activations.counts_F)
        if list(every) != chosen:
            records = FeatureRecords(activations, list(every), model, loaded.sae, settings)
        report.write_report(run_dir / "report.html", run, counted(records, bar(len(records), "report")), every)
    print_results(labels, len(every), run_dir)
    if broken:
        raise cli.Failed(f"the run was not finished: {broken}")


def opened() -> tuple[LoadedSAE, lm.LanguageModel]:
    """The autoencoder and the whole model."""
    return load_pair(config)


# ---- who explains ----


def explainer() -> str:
    """Who explains: EXPLAINER, or what the key and the base URL say."""
    if config.EXPLAINER is not None:
        return config.EXPLAINER
    return "openai" if config.OPENAI_API_KEY or config.OPENAI_BASE_URL else "offline"


def scorers() -> list[str]:
    """The methods of SCORERS."""
    return list(dict.fromkeys(config.SCORERS.replace(",", " ").split()))


# ---- what the features do on the corpus ----


def read_corpus(model: lm.LanguageModel, loaded: LoadedSAE, run_dir: Path) -> Cache:
    """The activations of all features on the corpus: those in RUN_DIR if they are of the same making, or a pass's."""
    corpus, folder, n_rows = Corpus.of(config), run_dir / cache.FOLDER, rows_wanted()
    print(f"corpus    {corpus.check()}")
    made_from = made_of(model, loaded)
    found, why = cache.open_cache(folder, made_from)
    if found is None:
        if why:
            print(why)
        print(f"reading {n_rows * (config.CONTEXT_LENGTH - 1):,} tokens for what activates each feature")
        skipped, seen = Skipped(), set[str]()
        packed = corpus.rows_with_documents(model.tokenizer, held_out=False, epochs=False, skipped=skipped)
        rows = islice(prefetch(strided(packed, seen), depth=1024), n_rows)
        with cli.Progress(total=n_rows * config.CONTEXT_LENGTH, unit=" tokens", unit_scale=True) as progress:
            cache.write(
                folder, made_from, counted(rows, progress, config.CONTEXT_LENGTH),
                model, loaded.sae, loaded.metadata.residual_layer, config.ROWS_PER_FORWARD,
            )  # fmt: skip
        found, why = cache.open_cache(folder, made_from)
        if found is None:
            raise cli.Failed(why)
        if skipped.count:
            print(skipped.summary())
        warn_of_few_documents(found, len(seen), n_rows)
    print(f"cache     {folder}: {found.tokens:,} tokens of {len(found.names):,} documents")
    return found


def strided(rows: Iterable[Row], seen: set[str]) -> Iterator[Row]:
    """Every EXPLAIN_STRIDE-th row; `seen` gets the documents that went by, until they are many."""
    for number, row in enumerate(rows):
        if len(seen) < 10 * FEW_DOCUMENTS:
            seen.update(row.documents)
        if number % config.EXPLAIN_STRIDE == 0:
            yield row


def warn_of_few_documents(found: Cache, n_seen: int, n_rows: int) -> None:
    """Say so if the documents are few, and which constant gives more."""
    scoring = int(found.for_scoring.sum())
    explaining = len(found.names) - scoring
    if min(explaining, scoring) >= FEW_DOCUMENTS:
        return
    if found.rows >= n_rows:
        advice = "raise EXPLAIN_TOKENS"
    elif n_seen > len(found.names):
        advice = (
            f"lower EXPLAIN_STRIDE, by which {config.EXPLAIN_STRIDE - 1} of {config.EXPLAIN_STRIDE} rows are left out"
        )
    else:
        advice = "use text of more files, or a .jsonl with a document a line"
    print(
        f"warning: found {explaining:,} documents to explain from and {scoring:,} to score on, and each gives a "
        f"feature one example: {advice}"
    )


def rows_wanted() -> int:
    """Rows of the corpus that are read."""
    return math.ceil(config.EXPLAIN_TOKENS / (config.CONTEXT_LENGTH - 1))


def settings_of_examples() -> Settings:
    """Which passages a feature is shown by."""
    return Settings(
        spread=config.EXAMPLES_PER_INTERVAL, left=config.TOKENS_BEFORE, right=config.TOKENS_AFTER, seed=config.SEED
    )


def made_of(model: lm.LanguageModel, loaded: LoadedSAE) -> dict[str, Any]:
    """All that the activations depend on."""
    corpus = Corpus.of(config)
    rows = {"files": corpus.fingerprint(), "stride": config.EXPLAIN_STRIDE, "rows": rows_wanted()}
    return cache.made_from(model, loaded.sae, loaded.metadata.residual_layer, asdict(corpus) | rows)


def counted(items: Iterable[Any], progress: cli.Progress, each: int = 1) -> Iterator[Any]:
    """The same items, each of which moves the bar."""
    for item in items:
        yield item
        progress.update(each)


# ---- explanations and scores ----


def label(records: FeatureRecords, model: lm.LanguageModel, run_dir: Path) -> tuple[dict[int, Label], str]:
    """A label for each of the features, none with DRY_RUN; and why the server answers no more, if that is so."""
    who, n = explainer(), len(records)
    if who == "offline":
        why = "" if config.EXPLAINER else ", since neither OPENAI_API_KEY nor OPENAI_BASE_URL is set"
        print(f"explainer offline: counting, without a model{why}")
        if config.DRY_RUN:
            print(f"{n:,} features would be explained without a request")
            return {}, ""
        with bar(n, "explaining") as progress:
            found = {each.feature: offline.find(each) for each in counted(records, progress)}
        with bar(n, "scoring") as progress:
            scored = counted(offline.score_all(found, records.__getitem__, seed=config.SEED), progress)
            return {each.feature: each for each in scored}, ""
    # The completions of the loaded model are kept apart, as they count towards no budget
    journal = Journal(run_dir / ("completions.jsonl" if who == "openai" else "completions-mistral.jsonl"))
    known = f", {len(journal):,} replies are in {journal.path}" if len(journal) else ""
    if config.DRY_RUN:
        keys = server().keys if who == "openai" else LocalClient(model, journal).keys
        dry = DryRun(prompts.dry_reply, keys, journal, budget(journal) if who == "openai" else Budget(journal))
        asyncio.run(ask(records, dry, who))
        print(f"explainer {name_of(who)}: {n:,} features need {dry.summary}; none was sent")
        return {}, ""
    if who == "mistral":
        print(f"explainer {who}: the loaded model itself{known}")
        return asyncio.run(ask(records, LocalClient(model, journal), who)), ""
    why = "" if config.EXPLAINER else "; since a key or a base URL is set (EXPLAINER=offline asks nobody)"
    print(f"explainer {name_of(who)} at {server().address}{known}{why}")
    if config.MAX_DOLLARS is not None and journal.unpriced:
        print(f"MAX_DOLLARS leaves out {journal.unpriced:,} tokens of earlier runs, whose prices were not known")
    return asyncio.run(ask_server(records, journal))


def name_of(who: str) -> str:
    """Of the explainer, as its labels have it."""
    return config.OPENAI_MODEL if who == "openai" else who


def server() -> Server:
    """The server that is asked."""
    return Server(
        model=config.OPENAI_MODEL,
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
    prices = Prices(config.PROMPT_DOLLARS, config.COMPLETION_DOLLARS)
    return Budget(journal, None if None in prices else prices, config.MAX_DOLLARS, config.MAX_API_TOKENS)


async def ask_server(records: FeatureRecords, journal: Journal) -> tuple[dict[int, Label], str]:
    """Labels by a server, each of whose completions is in the journal before it is used; and as `label`."""
    async with Client(server(), journal, budget(journal)) as client:
        try:
            labels = await ask(records, client, "openai")
        finally:
            print(*client.report, sep="\n")
        return labels, client.stopped if client.is_broken else ""


async def ask(records: FeatureRecords, completer: Completer, who: str) -> dict[int, Label]:
    """Explain all, then score all. A budget that is reached ends it early: the features that were left say so."""
    load = records.__getitem__
    with bar(len(records), "explaining") as progress:
        explanations = await pipeline.explain_all(
            records.features,
            load,
            completer,
            in_flight=config.CONCURRENCY,
            after_each=partial(advance, progress, completer),
        )
    with bar(len(records), "scoring") as progress:
        return await pipeline.score_all(
            explanations,
            load,
            completer,
            explainer=name_of(who),
            methods=scorers(),
            seed=config.SEED,
            in_flight=config.CONCURRENCY,
            after_each=partial(advance, progress, completer),
        )


def bar(total: int, what: str) -> cli.Progress:
    """A progress bar over features."""
    return cli.Progress(total=total, desc=what, unit=" features")


def advance(progress: cli.Progress, completer: Completer) -> None:
    """One feature further; with a server, what it has cost so far."""
    progress.update()
    if isinstance(completer, Client):
        progress.set_postfix_str(completer.progress)


# ---- what comes of it ----


def about_run(
    loaded: LoadedSAE, model: lm.LanguageModel, corpus: str, tokens: int, firings: Tensor | None
) -> report.Run:
    """What the pages say of the run as a whole."""
    evaluation, metrics = report.read_figures(Path(config.RUN_DIR)) if config.SAE_PATH is None else ({}, [])
    return report.Run(
        model="the bundled stand-in, a tiny Mistral that has read nothing but Python"
        if config.ON_STANDIN
        else model.name,
        layer=loaded.metadata.residual_layer,
        hook_name=loaded.metadata.hook_name,
        corpus=corpus,
        tokens=tokens,
        sae_path=config.SAE_PATH or str(Path(config.RUN_DIR) / "sae"),
        d_model=loaded.sae.d_model,
        n_features=loaded.sae.n_features,
        evaluation=evaluation,
        metrics=metrics,
        density_F=None if firings is None else firings.double() / max(1, tokens),
        geometry=None if firings is None else decoder_geometry(loaded.sae.W_dec, firings > 0),
    )


def show_text(run_dir: Path) -> None:
    """Write the page of TEXT: the strongest features of each of its tokens."""
    loaded, model = opened()
    sae, ids = loaded.sae, model.tokenizer.encode(config.TEXT)
    x_TD = model.residuals(torch.tensor([[model.tokenizer.bos_id, *ids]]), loaded.metadata.residual_layer)[0, 1:]
    encoded = sae.encode(x_TD)
    strongest = encoded.values.topk(min(SHOWN_FEATURES, encoded.values.shape[1]), dim=1)
    features = encoded.indices.gather(1, strongest.indices)
    tokens = [
        report.TextToken(string, [(f, v) for f, v in zip(fs, vs, strict=True) if v > 0])
        for string, fs, vs in zip(
            model.tokenizer.strings(ids), features.tolist(), strongest.values.tolist(), strict=True
        )
    ]
    folder, made_from = run_dir / cache.FOLDER, made_of(model, loaded)
    are_ours = cache.is_of(folder, made_from["autoencoder"])
    labels = read_labels(run_dir / "explanations.jsonl") if are_ours else {}
    activations, why = cache.open_cache(folder, made_from)
    fired = sorted({feature for token in tokens for feature, _ in token.features})
    records = FeatureRecords(activations, fired, model, sae, Settings()) if activations else None
    known = map(records.brief, fired) if records else ()
    page = run_dir / "text.html"
    report.write_text_page(page, about_run(loaded, model, "your text", len(ids), None), tokens, labels, known)
    print(
        f"page      {page}: {len(ids):,} tokens" + ("" if labels else "; run explain.py without TEXT for explanations")
    )
    if why:
        print(f"without passages: {why.split(':')[0]}")


def print_results(labels: dict[int, Label], n_labels: int, run_dir: Path) -> None:
    """How many features have a label, how good the labels are, and where they are; Failed if too few have one."""
    beside = f", beside {n_labels - len(labels):,} of earlier runs" if n_labels > len(labels) else ""
    print(f"\nlabels    {run_dir / 'explanations.jsonl'}{beside}")
    print(f"report    {run_dir / 'report.html'}\n")
    print(*pipeline.summary(labels.values()), sep="\n")
    failed = [label for label in labels.values() if pipeline.has_failed(label)]
    if len(failed) > config.MAX_FAILED_SHARE * len(labels):
        raise cli.Failed(
            f"{len(failed):,} of {len(labels):,} features have no label or no score, more than MAX_FAILED_SHARE, "
            f"{config.MAX_FAILED_SHARE:.0%}: {run_dir / 'explanations.jsonl'} says why"
            + (
                "; start again to ask for what got no answer"
                if any(map(pipeline.is_worth_asking_again, failed))
                else ""
            )
        )


if __name__ == "__main__":
    cli.run(
        main,
        out_of_memory="ROWS_PER_FORWARD",
    )
