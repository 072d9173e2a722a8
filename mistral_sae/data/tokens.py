"""Documents in, rows of tokens out.

The chain that a script writes, each stage an iterator over the one before:

    corpus = Corpus.of(config)
    rows = prefetch(corpus.rows(tokenizer, held_out=False), depth=64)
    for tokens_BT in batches(shuffle(rows, window=8192, seed=0), B): ...

B batch, T position.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from mistral_sae.data.documents import (
    MAX_DOCUMENT_BYTES,
    Skipped,
    check,
    documents,
    fingerprint,
    fits_in_memory,
    in_memory,
)
from mistral_sae.data.mixture import interleaved, one_for_each, sources_of
from mistral_sae.data.place import BEGINNING, Place
from mistral_sae.data.records import Document, TextError
from mistral_sae.model.source import ModelError
from mistral_sae.model.tokenizer import Tokenizer

# Seconds to wait at the end for the item under way, which may hang on the network; the thread is a daemon
JOIN = 1.0
GIVE_UP_AFTER = 1000  # conversations that the chat format does not take, one after the other

Item = TypeVar("Item")


class Row(NamedTuple):
    """A row of tokens, the documents it holds a part of, and its place in the stream."""

    tokens: np.ndarray  # (T,) int32
    document_of: np.ndarray  # (T,) int32: index into `documents` of each token's own; -1 for a BOS
    documents: list[str]  # their ids, in the order of the row
    place: Place = BEGINNING


def is_held_out(document_id: str, fraction: float) -> bool:
    """True if a document belongs to the held-out part of its corpus.

    A hash of the id decides, so the split does not move when documents are added, and the part held out at a smaller
    fraction lies inside the part held out at a larger one.
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class Corpus:
    """A corpus, its split into a training and a held-out part, and the length of its rows of tokens."""

    data_path: str  # as `documents` takes it, or several of these, "a*0.7 + b*0.3": a share of the documents each
    split: str = "train"  # of a dataset on the hub; as the next, "a + b" is one for each source of a mixture
    text_field: str = "text"
    held_out_fraction: float = 0.05
    seed: int = 0
    context_length: int = 256  # T, tokens a row
    max_document_bytes: int = MAX_DOCUMENT_BYTES  # of a line or a text; longer ones are skipped

    @classmethod
    def of(cls, constants: Any) -> Corpus:
        """The corpus that constants such as DATA_PATH and CONTEXT_LENGTH of a module or other namespace describe."""
        return cls(
            data_path=constants.DATA_PATH,
            split=constants.DATA_SPLIT,
            text_field=constants.TEXT_FIELD,
            held_out_fraction=constants.HELD_OUT_FRACTION,
            seed=constants.SEED,
            context_length=constants.CONTEXT_LENGTH,
            max_document_bytes=constants.MAX_DOCUMENT_BYTES,
        )

    def check(self) -> str:
        """A short description; a local corpus is read up to its first document. Raises TextError if it has none."""
        if sources := self._sources():
            return "; ".join(f"{100 * share:.3g}% from {source.check()}" for source, share in sources)
        return check(self.data_path, self.text_field, self.max_document_bytes)

    def fingerprint(self) -> str:
        """A hash of the names, sizes and contents of the corpus's files; of a dataset on the hub name@commit."""
        if sources := self._sources():
            return " + ".join(f"{source.fingerprint()}*{share:.6g}" for source, share in sources)
        return fingerprint(self.data_path)

    def is_shuffled(self) -> bool:
        """Whether the order of its documents depends on the seed."""
        return bool(self._sources()) or fits_in_memory(self.data_path)

    def _sources(self) -> list[tuple[Corpus, float]]:
        """The corpora of a mixture and their shares; [] if it is none."""
        if not (found := sources_of(self.data_path)):
            return []
        splits, fields = (one_for_each(words, len(found)) for words in (self.split, self.text_field))
        return [
            (replace(self, data_path=path, split=split, text_field=field), share)
            for (path, share), split, field in zip(found, splits, fields, strict=True)
        ]

    def documents(
        self, *, held_out: bool, epochs: bool = True, start: Place = BEGINNING, skipped: Skipped | None = None
    ) -> Iterator[Document]:
        """The documents of one part: the held-out ones once, the others epoch after epoch, or once without `epochs`.

        A corpus of up to `IN_MEMORY` bytes is read once, kept in memory and shuffled: the training part by (seed,
        epoch), the held-out part in one way whatever the seed, so that runs are evaluated on the same text. A larger
        corpus or a dataset on the hub comes in its own order in every epoch.

        They begin with the one at `start`, a place of this same stream. `skipped` counts what the first epoch that is
        read left out, from `start` on where the corpus is not kept in memory. Raises TextError where there is nothing
        to read, where the part has no document, and for damaged files.

        Of a mixture each source is such a stream, and the mixture ends with the first of them that does.
        """
        if sources := self._sources():
            options: Any = {"held_out": held_out, "epochs": epochs, "skipped": skipped}
            streams = [(each.data_path, share, partial(each.documents, **options)) for each, share in sources]
            yield from interleaved(streams, "held out" if held_out else self.seed, start)
            return
        left_out = Skipped()
        held = in_memory(self._part(held_out, BEGINNING, left_out)) if fits_in_memory(self.data_path) else None
        if held is not None and skipped is not None:
            skipped.take(left_out)
        for epoch in itertools.count(start.epoch):
            begin = start if epoch == start.epoch else Place(epoch)
            if held is None:
                yield from self._part(held_out, begin, skipped if epoch == start.epoch else None)
            else:
                shuffled = held.copy()
                random.Random("held out" if held_out else f"{self.seed} {epoch}").shuffle(shuffled)
                for number, document in enumerate(shuffled[begin.record :], begin.record):
                    yield document._replace(place=Place(epoch, record=number))
            if held_out or not epochs:
                return

    def _part(self, held_out: bool, start: Place, skipped: Skipped | None) -> Iterator[Document]:
        found = False
        for document in documents(
            self.data_path,
            text_field=self.text_field,
            max_bytes=self.max_document_bytes,
            split=self.split,
            start=start,
            skipped=skipped,
        ):
            if is_held_out(document.id, self.held_out_fraction) == held_out:
                found = True
                yield document
        if not found:
            part = f"the {'held-out' if held_out else 'training'} part"
            fraction = f"a held-out fraction of {self.held_out_fraction}"
            raise TextError(f"no document of {self.data_path!r} is in {part} at {fraction}: use more documents")

    def rows(
        self,
        tokenizer: Tokenizer,
        *,
        held_out: bool,
        epochs: bool = True,
        start: Place = BEGINNING,
        skipped: Skipped | None = None,
    ) -> Iterator[Row]:
        """Rows of token ids of one part from `start` on, as `pack` makes them. Raises TextError as `documents` does."""
        documents = self.documents(held_out=held_out, epochs=epochs, start=start, skipped=skipped)
        return pack(documents, tokenizer, self.context_length, start, skipped)

    def held_out_rows(self, tokenizer: Tokenizer, n_rows: int, stride: int = 1) -> torch.Tensor:
        """Every `stride`-th row of the held-out part, (R, T) with R up to `n_rows`. Raises TextError if it has none."""
        apart = itertools.islice(self.rows(tokenizer, held_out=True), 0, None, stride)
        rows = next(batches(apart, n_rows), None)
        if rows is None:
            found = f"less text than one row of {self.context_length} tokens"
            raise TextError(f"the held-out part has {found}: use more text or raise HELD_OUT_FRACTION")
        return rows


def tokens_of(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids (int32) of a document, without a BOS before them; messages in the model's own chat format.

    Raises ModelError for messages that this format does not take, TextError for ids that the tokenizer does not have.
    """
    if document.tokens is not None:
        if (largest := document.tokens.max()) >= tokenizer.vocab_size:
            found = f"found token id {largest} in {document.id}, expected at most {tokenizer.vocab_size - 1}"
            raise TextError(f"{found}: use tokens of this model's tokenizer, or text")
        ids = document.tokens
    elif document.messages is not None:
        ids = np.asarray(tokenizer.chat(document.messages), np.int32)
    else:
        return np.asarray(tokenizer.encode(document.text), np.int32)
    return ids[1:] if ids[0] == tokenizer.bos_id else ids


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context_length: int,
    start: Place = BEGINNING,
    skipped: Skipped | None = None,
) -> Iterator[Row]:
    """Rows of token ids, T = `context_length` each: full, without padding.

    Position 0 of each row is a BOS, and a BOS stands between two documents (one, where a document ends with its row).
    A document that does not fit goes on in the next row, so no token is lost but those of the last row of a finite
    stream, where it is not full. A document is tokenized whole, because a cut could change its tokens.

    Of the first document `start.tokens` tokens are left out, which earlier rows hold. Conversations that the chat
    format does not take are counted in `skipped`; the ModelError is raised after many without another document. Raises
    ValueError where a row has no room for text.
    """
    if context_length < 2:
        raise ValueError(f"a row of {context_length} tokens has no room for text after its BOS: use 2 or more")

    def empty(place: Place) -> Row:
        no_document = np.full(context_length, -1, np.int32)
        return Row(np.full(context_length, tokenizer.bos_id, np.int32), no_document, [], place)

    row, filled, used, refused = empty(start), 1, start.tokens, 0
    for document in documents:
        try:
            tokens, refused = tokens_of(document, tokenizer)[used:], 0
        except ModelError as error:
            refused += 1
            if refused == GIVE_UP_AFTER:
                raise
            if skipped is not None:
                skipped.add(document.id, str(error))
            continue
        if filled > 1 and len(tokens):
            filled += 1  # the BOS between two documents, which `empty` has put there
        while True:
            if filled == context_length:
                yield row
                row, filled = empty(document.place._replace(tokens=used)), 1
            if not len(tokens):
                break
            fits, tokens = np.split(tokens, [context_length - filled])
            row.tokens[filled : filled + len(fits)] = fits
            row.document_of[filled : filled + len(fits)] = len(row.documents)
            row.documents.append(document.id)
            filled += len(fits)
            used += len(fits)
        used = 0


def shuffle(rows: Iterable[Row], window: int, seed: int, start: Place = BEGINNING) -> Iterator[Row]:
    """The same rows, each `window` of them in an order by (seed, number of the window).

    Rows of tokens are small, residuals are not: this mixes a far longer stretch of text than a buffer of those holds.
    `rows` begin with the window `start.window`, of which the first `start.rows` are left out.
    """
    rows, taken = iter(rows), start.rows
    for number in itertools.count(start.window):
        if not (block := list(itertools.islice(rows, window))):
            return
        begin = block[0].place
        random.Random(f"{seed} {number}").shuffle(block)
        for i, row in enumerate(block[taken:], taken):
            yield row._replace(place=begin._replace(window=number, rows=i))
        taken = 0


def batches(rows: Iterable[Row], batch_size: int) -> Iterator[torch.Tensor]:
    """The tokens of rows as LongTensors (B, T), B = `batch_size`; the last one may have fewer rows."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield torch.from_numpy(np.stack([row.tokens for row in batch], dtype=np.int64))


def prefetch(iterator: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, made ahead of their use by a background thread: up to `depth` of them (1 or more) wait.

    What `iterator` raises is raised here, after the items before it. Closing this generator, by hand or because its
    user was interrupted, ends the thread after the item under way and closes `iterator`.
    """
    if depth < 1:
        raise ValueError(f"a depth of {depth} items leaves nothing to make ahead: use 1 or more")
    source = iter(iterator)
    slots = threading.Semaphore(depth)  # taken before an item is made: `depth` bounds what is in memory
    ready: queue.SimpleQueue = queue.SimpleQueue()  # of (item, None), then one (None, why it ended)
    stopped = threading.Event()

    def work() -> None:
        try:
            while slots.acquire() and not stopped.is_set():
                ready.put((next(source), None))
        except BaseException as end:  # StopIteration among them; the consumer sorts them out
            ready.put((None, end))
        finally:
            if hasattr(source, "close"):
                source.close()  # here, since a generator can be closed only where it is not running

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, end = ready.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            slots.release()
            yield item
    finally:
        stopped.set()
        slots.release()
        thread.join(JOIN)
