"""Text in, rows of tokens out: sources -> documents -> rows of tokens (B, T).

The chain that a script writes, each stage an iterator over the one before:

    docs = corpus(DATA_PATH, held_out=False, held_out_fraction=0.05, seed=SEED)
    rows = pack(docs, tokenizer, CONTEXT_LENGTH)
    for tokens_BT in prefetch(batches(rows, B), depth=8): ...

B batch, T position.
"""

import hashlib
import itertools
import queue
import random
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np

from mistral_sae.data.readers import Document, TextError
from mistral_sae.data.sources import Skipped, check, documents, fingerprint, fits_in_memory, stdlib_documents

if TYPE_CHECKING:
    import torch

__all__ = [
    "Document",
    "Row",
    "Skipped",
    "TextError",
    "Tokenizer",
    "batches",
    "check",
    "corpus",
    "documents",
    "fingerprint",
    "is_held_out",
    "pack",
    "pack_with_documents",
    "prefetch",
    "shuffle",
    "stdlib_documents",
]

# Seconds to wait at the end for the item under way, which may hang on the network; the thread is a daemon
JOIN = 1.0

Item = TypeVar("Item")


class Row(NamedTuple):
    """A row of tokens, and the documents it holds a part of."""

    tokens: np.ndarray  # (T,) int64
    places: np.ndarray  # (T,) int64: the place in `documents` of each token's own; -1 for a BOS
    documents: list[str]  # their ids, in the order of the row


class Tokenizer(Protocol):
    """What packing needs to know of a tokenizer."""

    bos_id: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a BOS."""


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part of its corpus.

    A hash of the id decides, so the split needs no list, does not move when documents are added, and the part
    held out at a smaller fraction lies inside the part held out at a larger one.
    """
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def corpus(
    data_path: str,
    *,
    held_out: bool,
    held_out_fraction: float,
    seed: int = 0,
    epochs: bool = True,
    text_field: str = "text",
    split: str = "train",
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """The documents of one part of a corpus: the held-out ones once, the others epoch after epoch.

    "stdlib" and local corpora of up to `sources.IN_MEMORY` bytes are read once, kept in memory and
    shuffled: the training part anew by (seed, epoch), the held-out part in one way whatever the seed, so
    that runs are evaluated on the same text. A larger corpus or a hub stream comes in its own order in
    every epoch. With `epochs` false the training part comes only once too. The order is a function of the
    arguments and the corpus alone, so a run can be repeated and resumed.

    `skipped` counts what the first epoch left out. Raises what `documents` raises, and TextError where the
    part has no document.
    """

    def read(skipped: Skipped | None) -> Iterator[Document]:
        found = False
        for document in documents(data_path, text_field=text_field, split=split, skipped=skipped):
            if is_held_out(document.id, held_out_fraction) == held_out:
                found = True
                yield document
        if not found:
            raise TextError(
                f"no document of {data_path!r} is in the {'held-out' if held_out else 'training'} part "
                f"at a held-out fraction of {held_out_fraction}: use more documents or another fraction"
            )

    in_memory = list(read(skipped)) if fits_in_memory(data_path) else None
    for epoch in itertools.count():
        if in_memory is None:
            yield from read(skipped if epoch == 0 else None)
        else:
            order = list(range(len(in_memory)))
            random.Random("held out" if held_out else f"{seed} {epoch}").shuffle(order)
            yield from (in_memory[index] for index in order)
        if held_out or not epochs:
            return


def pack(
    documents: Iterable[Document], tokenizer: Tokenizer, context_length: int, *, start_row: int = 0
) -> Iterator[np.ndarray]:
    """Rows (T,) of token ids, int64, T = `context_length`: full, without padding.

    Position 0 of each row is a BOS, and a BOS stands between two documents; where a document ends exactly
    at the end of a row, the BOS of the next row is the one between and is not doubled. A document that does
    not fit goes on in the next row: the rows without their first tokens, end to end, hold every token of
    every document. Only the last row of a finite stream is left out, where it is not full.

    `start_row` leaves out that many rows: a run that has used n rows goes on with row n of the same
    documents. The text before it is read and tokenized again, at the speed of the tokenizer, since nothing
    else tells where a row begins. A document is tokenized whole, because a cut could change its tokens.

    Raises ValueError where a row has no room for text.
    """
    rows = pack_with_documents(documents, tokenizer, context_length)
    yield from (row.tokens for row in itertools.islice(rows, start_row, None))


def pack_with_documents(documents: Iterable[Document], tokenizer: Tokenizer, context_length: int) -> Iterator[Row]:
    """The rows of `pack`, and of which document each of their tokens is. Raises ValueError as it does."""
    if context_length < 2:
        raise ValueError(f"a row of {context_length} tokens has no room for text after its BOS: use 2 or more")

    def empty() -> Row:
        tokens = np.full(context_length, tokenizer.bos_id, dtype=np.int64)
        return Row(tokens, np.full(context_length, -1, dtype=np.int64), [])

    row, filled = empty(), 1
    for document in documents:
        tokens = np.asarray(tokenizer.encode(document.text), dtype=np.int64)
        if filled > 1 and len(tokens):
            filled += 1  # the BOS between two documents, which `empty` has put there
        used = 0
        while True:
            if filled == context_length:
                yield row
                row, filled = empty(), 1
            if used == len(tokens):
                break
            count = min(context_length - filled, len(tokens) - used)
            row.tokens[filled : filled + count] = tokens[used : used + count]
            row.places[filled : filled + count] = len(row.documents)
            row.documents.append(document.id)
            filled, used = filled + count, used + count


def shuffle(rows: Iterable[np.ndarray], window: int, seed: int) -> Iterator[np.ndarray]:
    """The same rows, each `window` of them in an order by (seed, number of the window).

    Rows of tokens are small, residuals are not: shuffling these mixes the documents of a far longer stretch of text
    than a buffer of residuals holds.
    """
    rows = iter(rows)
    for number in itertools.count():
        block = list(itertools.islice(rows, window))
        if not block:
            return
        random.Random(f"{seed} {number}").shuffle(block)
        yield from block


def batches(rows: Iterable[np.ndarray], batch_size: int) -> Iterator["torch.Tensor"]:
    """Rows (T,) as LongTensors (B, T), B = `batch_size`; the last one may have fewer rows."""
    import torch

    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield torch.from_numpy(np.stack(batch))


def prefetch(iterator: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, made ahead of their use by a background thread: up to `depth` of them (1 or more) wait.

    The thread starts with the first item asked for. What `iterator` raises is raised here, after the items
    before it. Closing this generator, by hand or because its user was interrupted, ends the thread after
    the item under way and closes `iterator`.
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
