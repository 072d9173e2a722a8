"""Several corpora as one, each with its share of the documents: what `datasets.interleave_datasets` does by chance."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from mistral_sae.data.place import Place
from mistral_sae.data.records import Document, TextError

_WEIGHT = re.compile(r"\s*(\d{1,9}\.?\d*|\.\d+)\s*")


def sources_of(data_path: str) -> list[tuple[str, float]]:
    """The corpora of a mixture such as "a*0.7 + b*0.3", with their shares; [] for a DATA_PATH that is none.

    A weight that is left out is 1. Raises TextError for a weight of 0.
    """
    if " + " not in data_path or Path(data_path).exists():
        return []
    weighted = []
    for part in data_path.split(" + "):
        path, _, weight = part.rpartition("*")
        weighted.append((path.strip(), float(weight)) if _WEIGHT.fullmatch(weight) and path else (part.strip(), 1.0))
    if not all(weight for _, weight in weighted):
        raise TextError(f"found a weight of 0 in {data_path!r}: expected more, as in 'a*0.7 + b*0.3'")
    total = sum(weight for _, weight in weighted)
    return [(path, weight / total) for path, weight in weighted]


def one_for_each(words: str, sources: int) -> list[str]:
    """What "a + b" says of each of two sources, or "a" of all. Raises TextError where it is neither."""
    found = words.split(" + ")
    if len(found) not in (1, sources):
        raise TextError(f"found {words!r} for {sources} sources of text: expected one for all, or one for each")
    return found if len(found) == sources else found * sources


Stream = tuple[str, float, Callable[..., Iterator[Document]]]  # name, share, and its documents from `start` on


def interleaved(streams: Sequence[Stream], seed: int | str, start: Place) -> Iterator[Document]:
    """The documents of streams until one of them ends; ids begin with the name of the stream.

    Which stream the next document is of is drawn by (seed, its number), with the shares as probabilities.
    """
    names, shares, open_at = zip(*streams, strict=True)
    begin = [Place.of(fields) for fields in start.mixed or [{}] * len(streams)]
    sources = [read(start=place) for read, place in zip(open_at, begin, strict=True)]
    waiting = [next(source) for source in sources]
    for number in count(start.record):
        places = [document.place._asdict() for document in waiting]
        (drawn,) = random.Random(f"{seed} {number}").choices(range(len(streams)), shares)
        found = waiting[drawn]
        id = found.id if found.place.hub else f"{names[drawn]}/{found.id}"
        yield found._replace(id=id, place=Place(record=number, mixed=places))
        try:
            waiting[drawn] = next(sources[drawn])
        except StopIteration:
            return
