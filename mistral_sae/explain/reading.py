"""The pass over a corpus that fills the cache: which rows it reads, and what is said of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mistral_sae.cli import Failed, Progress, UserError
from mistral_sae.data.documents import Skipped
from mistral_sae.data.tokens import Corpus, prefetch
from mistral_sae.distributed import ALONE, Group
from mistral_sae.explain import cache
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae.checkpoint import LoadedSAE

FEW_DOCUMENTS = 30  # below which a feature has hardly ten examples to explain it from


@dataclass(frozen=True)
class Reading:
    """Which rows of a corpus a pass reads."""

    corpus: Corpus
    n_rows: int
    stride: int = 1  # every so many rows one
    rows_per_forward: int = 16

    @classmethod
    def of(cls, constants: Any) -> Reading:
        """Read from constants such as config.py's."""
        n_rows = math.ceil(constants.EXPLAIN_TOKENS / (constants.CONTEXT_LENGTH - 1))
        return cls(Corpus.of(constants), n_rows, constants.EXPLAIN_STRIDE, constants.ROWS_PER_FORWARD)

    def described(self) -> dict[str, Any]:
        """What tells the rows from others, as JSON."""
        files = {"files": self.corpus.fingerprint()}
        seed = {"seed": self.corpus.seed if self.corpus.is_shuffled() else None}
        return asdict(self.corpus) | seed | files | {"stride": self.stride, "rows": self.n_rows}


def read_corpus(
    folder: Path,
    reading: Reading,
    model: LanguageModel,
    loaded: LoadedSAE,
    keep_other: bool = False,
    ranks: Group = ALONE.ranks,
) -> cache.Cache:
    """The cache in a folder, if it is of this corpus, model and autoencoder; else the one that a pass now writes there.

    Prints what is done and found. Raises TextError for a corpus that cannot be read, and with `keep_other` UserError
    in place of writing over a cache of something else. Several ranks share the pass.
    """
    layer, row_tokens = loaded.metadata.residual_layer, reading.corpus.context_length
    described = cache.made_from(model, loaded.sae, layer, reading.described())
    found, why = cache.open_cache(folder, described)
    ranks.wait()  # until all have looked
    if found is None:
        if why:
            if keep_other and cache.is_of_another_making(folder, described):
                raise UserError(f"{why} by a run without DRY_RUN; set another RUN_DIR to try these settings")
            print(why)
        print(f"reading {reading.n_rows * (row_tokens - 1):,} tokens for what activates each feature")
        skipped, last = Skipped(), (reading.n_rows - 1) * reading.stride
        packed = reading.corpus.rows(model.tokenizer, held_out=False, epochs=False, skipped=skipped)
        rows = prefetch(itertools.islice(packed, 0, last + 1, reading.stride), depth=1024)
        with Progress(rows, "reading", reading.n_rows, unit=" tokens", unit_scale=row_tokens) as counted:
            cache.write(folder, described, counted, model, loaded.sae, layer, reading.rows_per_forward, ranks)
        found, why = cache.open_cache(folder, described)
        if found is None:
            raise Failed(why)
        if skipped.count:
            print(skipped.summary())
        _warn_of_few_documents(found, reading)
    print(f"cache     {folder}: {found.tokens:,} tokens of {len(found.names):,} documents")
    return found


def rows_of(model: LanguageModel, text: str, row_tokens: int) -> list[list[int]]:
    """The token ids of a text in rows of as many as the corpus's have, each with its BOS first; of no text no row."""
    bos, *ids = model.encode(text)
    return [[bos, *ids[i : i + row_tokens - 1]] for i in range(0, len(ids), row_tokens - 1)]


@torch.no_grad()
def strongest(model: LanguageModel, loaded: LoadedSAE, ids: list[int], count: int) -> list[list[tuple[int, float]]]:
    """The strongest features of each token of a row but the first, the BOS: at most so many (feature, activation)."""
    encoded = loaded.sae.encode(model.residuals(torch.tensor([ids]), loaded.metadata.residual_layer)[0, 1:])
    found = encoded.values.topk(min(count, encoded.values.shape[1]), dim=1)
    features = encoded.indices.gather(1, found.indices).tolist()
    pairs = (zip(*each, strict=True) for each in zip(features, found.values.tolist(), strict=True))
    return [[(feature, value) for feature, value in each if value > 0] for each in pairs]


def _warn_of_few_documents(found: cache.Cache, reading: Reading) -> None:
    """Say so if the documents are few, and which constant gives more."""
    scoring = int(found.for_scoring.sum())
    explaining = len(found.names) - scoring
    if min(explaining, scoring) >= FEW_DOCUMENTS:
        return
    if found.rows >= reading.n_rows:
        advice = "raise EXPLAIN_TOKENS"
    elif reading.stride > 1:
        advice = f"lower EXPLAIN_STRIDE, by which {reading.stride - 1} of {reading.stride} rows are left out"
    else:
        advice = "use text of more files, or a .jsonl with a document a line"
    print(
        f"warning: found {explaining:,} documents to explain from and {scoring:,} to score on, and each gives a "
        f"feature one example: {advice}"
    )
