"""One pass over a corpus: for every feature its strongest passages, passages from all of its range, and statistics.

    collection = collect(rows, lm, sae, layer)

Memory does not depend on the corpus's length: each feature has lists of fixed length (`reservoir`). What they hold in
the end depends on the corpus and the seed, not on how its rows were batched. They are kept by STRATA of a range
(0, 2**e) that doubles whenever the feature's maximum outgrows it, since its true range is known only at the end; strata
then join, and nothing that could still be needed has been dropped. Activations are rounded to float16 before anything
else, so that maximum, histogram and examples agree exactly.

Documents are split in two halves by a hash of their ids: passages to explain a feature from are of one half, passages
to score the explanation on of the other (`firings.is_for_scoring`).

Shapes: B rows, T positions, K active features a token, F features, M passages, W tokens of a window, S STRATA, C places
in a list, n examples of a list, R rows of the pool.
"""

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mistral_sae.data.tokens import Row
from mistral_sae.explain.firings import Firings, document_key, is_for_scoring, layout_of
from mistral_sae.explain.pool import Pool, PoolRows
from mistral_sae.explain.reservoir import EMPTY, Reservoir, Windows, drawn, mix, token_dtype
from mistral_sae.explain.types import BINS, INTERVALS
from mistral_sae.model.language_model import LanguageModel
from mistral_sae.sae import kernels
from mistral_sae.sae.autoencoder import SparseAutoencoder

STRATA = 4 * INTERVALS  # of (0, 2**e), of which the true range is more than half: an interval covers more than two
FINE_BINS = 256  # of the same range, from which the histogram is made
LARGEST = torch.finfo(torch.float16).max  # activations above it are taken for it
INFINITE = 0x7C00  # the bits of float16's infinity; those of positive numbers rise with the numbers, up to these
MOST_WINDOWS = 2**16  # cut out of a batch at a time
NAMES = 2**16  # documents' ids that are held before those that no list needs are dropped


class Settings(NamedTuple):
    """What is collected for each feature; all but `seed` at least 1, or at least 0 for `left` and `right`."""

    top: int = 10  # strongest examples
    spread: int = 3  # examples an interval
    held_out: int = 5  # examples an interval, to score on
    left: int = 48  # tokens of an example before its peak, as far as row and document have them
    right: int = 15  # and after it
    pool_rows: int = 512  # rows from which passages are drawn on which a feature does not fire
    seed: int = 0


class Collection(NamedTuple):
    """What a pass found, on the CPU. Documents are places in `names`; a length of 0 is no passage."""

    settings: Settings
    tokens: int  # seen: all but the first position of each row and the BOS between documents
    firings: Tensor  # (F) int64, tokens on which each feature fired
    maximum: Tensor  # (F) float32, 0 where it never did
    histogram: Tensor  # (F, BINS) int64, over (0, maximum]
    top: Windows  # (F, n), strongest first
    spread: Windows  # (F, INTERVALS * n), strongest first
    held_out: Windows  # likewise
    pool: Pool
    names: list[str]

    def documents(self) -> tuple[int, int]:
        """How many documents examples to explain from are of, and how many those to score on."""
        scoring = sum(map(is_for_scoring, self.names))
        return len(self.names) - scoring, scoring


@torch.no_grad()
def collect(
    rows: Iterable[Row],
    lm: LanguageModel,
    sae: SparseAutoencoder,
    layer: int,
    settings: Settings | None = None,
    *,
    rows_per_forward: int = 16,
) -> Collection:
    """Run rows (of one length) through the model up to `layer` and the encoder, and collect examples of all features.

    A pass that is interrupted leaves nothing behind; the next one begins anew. The first position of a row and the BOS
    between documents are never part of an example. Raises ValueError where there is no row.
    """
    collector = Collector(sae.n_features, lm.vocab_size, settings or Settings(), lm.device)
    rows = iter(rows)
    while batch := list(islice(rows, rows_per_forward)):
        x_BTD = lm.residuals(torch.from_numpy(np.stack([row.tokens for row in batch])), layer)
        collector.add(batch, *encode(sae, without_sinks(batch, x_BTD)))
    return collector.finish()


def without_sinks(rows: list[Row], x_BTD: Tensor) -> Tensor:
    """Residuals with another token's at the positions of which nothing is kept.

    There a feature's activation says nothing, and an autoencoder without a fixed K may have thousands of them.
    """
    counts_BT = np.stack([row.places for row in rows]) >= 0
    counts_BT[:, 0] = False
    first = int(counts_BT.argmax())
    counts = torch.from_numpy(counts_BT).to(x_BTD.device).unsqueeze(2)
    return torch.where(counts, x_BTD, x_BTD.flatten(0, 1)[first])


def encode(sae: SparseAutoencoder, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices (B, T, K) as `sae.encode` gives them; bfloat16 nominates the features where that pays."""
    if sae.activation != "topk":  # all F pre-activations exist, those of a row at a time
        encoded = [sae.encode(x_TD) for x_TD in x_BTD]
        most = max(each.values.shape[1] for each in encoded)
        padded = ([pad(x, (0, most - x.shape[1])) for x in (each.values, each.indices)] for each in encoded)
        return tuple(map(torch.stack, zip(*padded, strict=True)))
    z, _, _ = sae.standardize(x_BTD.flatten(0, 1))
    centered = z - sae.b_dec if sae.center else z
    bf16 = kernels.bf16_pays(z.device)
    values, indices, _ = kernels.encode(centered, sae.W_enc, sae.b_enc, sae.k, bf16=bf16)
    return values.unflatten(0, x_BTD.shape[:2]), indices.unflatten(0, x_BTD.shape[:2])


class Collector:
    """The state of a pass: `add` batches of encoded rows, then `finish`."""

    def __init__(self, n_features: int, vocab_size: int, settings: Settings, device: torch.device | str):
        for name, value in settings._asdict().items():
            least = 0 if name in ("left", "right", "seed") else 1
            if value < least:
                raise ValueError(f"found {name}={value} in the settings of the examples: expected {least} or more")
        self.settings, self.device = settings, torch.device(device)
        self.n_rows = self.n_tokens = 0
        self.firings = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.maximum = torch.zeros(n_features, device=device)
        self.exponent = torch.zeros(n_features, dtype=torch.int32, device=device)  # e, once a feature has fired
        self.scale = torch.zeros(n_features, device=device)  # 2**-e
        self.fine = torch.zeros(n_features, FINE_BINS, dtype=torch.int32, device=device)
        self.ids = token_dtype(vocab_size)
        window = settings.left + 1 + settings.right
        self.top = Reservoir(n_features, settings.top, window, self.ids, device)
        # In a stratum half of what an interval is to have, rounded up, since it covers more than two
        self.spread, self.held_out = (
            Reservoir(n_features * STRATA, -(-n // 2), window, self.ids, device)
            for n in (settings.spread, settings.held_out)
        )
        self.pool = PoolRows(settings.pool_rows, settings.seed)
        self.names: dict[int, str] = {}  # by `document_key`
        self._most_names = NAMES

    def bytes(self) -> int:
        """Memory of the state on the device, without the pool's rows."""
        statistics = (self.firings, self.maximum, self.exponent, self.scale, self.fine)
        lists = (self.top, self.spread, self.held_out)
        return sum(tensor.nbytes for tensor in statistics) + sum(reservoir.bytes() for reservoir in lists)

    @torch.no_grad()
    def add(self, rows: list[Row], values_BTK: Tensor, indices_BTK: Tensor) -> None:
        """Take in rows (B) and their active features, values above 0 being firings.

        All of it runs on the device. The number of operations depends on nothing but how many windows are cut out, for
        each MOST_WINDOWS of which there are some more. The host waits wherever a size depends on the data, 14 to 20
        times a batch: first for the model, then some microseconds each.
        """
        layout = layout_of(rows)
        values_BTK = values_BTK.clamp(0, LARGEST).half()
        settings = self.settings
        firings = Firings(layout.to(self.device), values_BTK.float(), indices_BTK, settings.left, settings.right)
        self._count(firings)
        self._choose(firings, self.n_rows * layout.length)
        self.pool.add(layout, values_BTK, indices_BTK, self.n_rows)

        self.n_rows += len(rows)
        self.n_tokens += int((layout.documents != 0).sum())
        self.names.update((document_key(name), name) for row in rows for name in row.documents)
        if len(self.names) > self._most_names:
            self.names = {key: self.names[key] for key in self._documents().tolist()}
            self._most_names = 2 * len(self.names) + NAMES

    def _count(self, firings: Firings) -> None:
        """Firings, maxima and histograms; where a feature's range grows, its lists are sorted into the new strata."""
        feature = firings.feature
        fired_before = self.firings > 0
        self.firings.scatter_add_(0, feature, torch.ones_like(feature))
        self.maximum.scatter_reduce_(0, feature, firings.value, "amax")
        mantissa, exponent = torch.frexp(self.maximum)
        grown = (fired_before & (exponent > self.exponent)).nonzero().squeeze(1)
        octaves = (exponent - self.exponent)[grown]
        self.exponent, self.scale = exponent, mantissa / self.maximum

        column = torch.arange(FINE_BINS, device=self.device) >> octaves.unsqueeze(1)
        before = self.fine[grown]
        self.fine[grown] = torch.zeros_like(before).scatter_add_(1, column, before)
        cell = feature * FINE_BINS + (firings.value * self.scale[feature] * FINE_BINS).long()
        self.fine.view(-1).scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))

        if not len(grown):
            return
        groups = (grown.unsqueeze(1) * STRATA + torch.arange(STRATA, device=self.device)).flatten()
        for reservoir in (self.spread, self.held_out):
            group, ranks, windows = reservoir.take(groups)
            reservoir.offer(self._group(group // STRATA, windows.activations.float().amax(dim=1)), ranks, windows)

    def _group(self, feature_M: Tensor, value_M: Tensor) -> Tensor:
        """The list of `spread` and `held_out` in which passages of these strengths belong."""
        return feature_M * STRATA + (value_M * self.scale[feature_M] * STRATA).long()

    def _choose(self, firings: Firings, first_token: int) -> None:
        """Offer passages to the lists: firings that are the strongest in their window and rank low enough.

        Once the lists are full most fail by their rank; only the windows of the others are cut out.
        """
        near = firings.unbeaten()
        feature, value = firings.feature[near], firings.value[near]
        scoring = firings.layout.scoring[firings.token[near]]
        by_strength = INFINITE - value.half().view(torch.int16).int()
        at_random = drawn(mix(firings.token[near] + first_token) ^ feature, self.settings.seed)
        group = self._group(feature, value)
        offers = (
            (self.top, feature, by_strength, ~scoring & (by_strength < self.top.worst[feature])),
            (self.spread, group, at_random, ~scoring & (at_random < self.spread.worst[group])),
            (self.held_out, group, at_random, scoring & (at_random < self.held_out.worst[group])),
        )
        hopeful = torch.stack([hopes for *_, hopes in offers]).any(dim=0).nonzero().squeeze(1)
        parts = [firings.windows(part, self.ids) for part in near[hopeful].split(MOST_WINDOWS)]
        windows = Windows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        peak = windows.activations.float().amax(dim=1) <= value[hopeful]
        for reservoir, groups, ranks, hopes in offers:
            chosen = (hopes[hopeful] & peak).nonzero().squeeze(1)
            reservoir.offer(groups[hopeful[chosen]], ranks[hopeful[chosen]], windows.at(chosen))

    def _documents(self) -> Tensor:
        """Keys of the documents of which the lists and the pool hold a part, ascending."""
        lists = (self.top, self.spread, self.held_out)
        keys = [torch.unique(reservoir.windows.documents[reservoir.ranks < EMPTY]).cpu() for reservoir in lists]
        pooled = self.pool.finish().documents
        return torch.unique(torch.cat((*keys, pooled[pooled >= 0])))

    @torch.no_grad()
    def finish(self) -> Collection:
        """What was collected. Raises ValueError if nothing was added."""
        if not self.n_rows:
            raise ValueError("there is not one row to collect examples from: use more text or a shorter context")
        keys, pool, settings = self._documents(), self.pool.finish(), self.settings
        spread = _stratified(self.spread, self.maximum, settings.spread)
        held_out = _stratified(self.held_out, self.maximum, settings.held_out)
        ranks, order = self.top.ranks.sort(dim=1)
        top = _picked(self.top.windows, order, ranks < EMPTY)
        places = torch.searchsorted(keys, pool.documents).int()
        return Collection(
            settings,
            self.n_tokens,
            self.firings.cpu(),
            self.maximum.cpu(),
            torch.from_numpy(_histogram(*(x.cpu().numpy() for x in (self.fine, self.maximum * self.scale)))),
            *(w._replace(documents=torch.searchsorted(keys, w.documents).int()) for w in (top, spread, held_out)),
            pool._replace(documents=torch.where(pool.documents < 0, -1, places)),
            [self.names[key] for key in keys.tolist()],
        )


def _picked(windows: Windows, places_Fn: Tensor, there_Fn: Tensor) -> Windows:
    """Of each feature's passages (F, C) those at `places_Fn`, on the CPU; nothing where one is not `there_Fn`."""
    every = torch.arange(len(places_Fn), device=places_Fn.device).unsqueeze(1)
    picked = windows.at((every, places_Fn))
    shape = there_Fn.shape
    return Windows(*((x * there_Fn.view(*shape, *[1] * (x.ndim - 2))).cpu() for x in picked))


def _stratified(reservoir: Reservoir, maximum_F: Tensor, per_interval: int) -> Windows:
    """Of each feature's lists up to `per_interval` passages of each interval, at most one a document, strongest first.

    Passages of documents that are in few of the lists are taken first, since they leave more to the others; then the
    first of each stratum before the second, and those of strong strata, which have fewer.
    """
    n_features, device = len(maximum_F), maximum_F.device
    ranks = reservoir.ranks.view(n_features, -1)
    windows = Windows(*(x.view(*ranks.shape, *x.shape[2:]) for x in reservoir.windows))
    there, documents = ranks < EMPTY, windows.documents
    strengths = torch.stack([part.float().amax(dim=1) for part in windows.activations.unbind(dim=1)], dim=1).double()
    interval = (INTERVALS * strengths / maximum_F.double().unsqueeze(1)).nan_to_num(0).long().clamp(max=INTERVALS - 1)

    in_lists = torch.stack([((documents == one.unsqueeze(1)) & there).sum(dim=1) for one in documents.unbind(dim=1)], 1)
    number = reservoir.ranks.argsort(dim=1).argsort(dim=1).view(n_features, -1)
    weaker = STRATA - 1 - torch.arange(STRATA, device=device).repeat_interleave(reservoir.ranks.shape[1])
    order = torch.where(there, (in_lists * ranks.shape[1] + number) * STRATA + weaker, EMPTY).argsort(dim=1)
    picked = torch.zeros(n_features, INTERVALS * per_interval, dtype=torch.int64, device=device)
    picked_documents = torch.full_like(picked, -1)
    filled = torch.zeros(n_features, INTERVALS, dtype=torch.int64, device=device)
    for place in order.split(1, dim=1):
        document, of = documents.gather(1, place), interval.gather(1, place)
        count = filled.gather(1, of)
        fits = there.gather(1, place) & (count < per_interval)
        fits &= (picked_documents != document).all(dim=1, keepdim=True)
        at = of * per_interval + count.clamp(max=per_interval - 1)
        picked.scatter_(1, at, torch.where(fits, place, picked.gather(1, at)))
        picked_documents.scatter_(1, at, torch.where(fits, document, picked_documents.gather(1, at)))
        filled.scatter_add_(1, of, fits.long())
    there = picked_documents >= 0
    strengths = torch.where(there, strengths.gather(1, picked), -1.0)
    order = strengths.argsort(dim=1, descending=True, stable=True)
    return _picked(windows, picked.gather(1, order), there.gather(1, order))


def _histogram(fine: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Counts (F, FINE_BINS) over (0, 2**e) as counts (F, BINS) over (0, maximum], with the same sum.

    `extent` (F) is the maximum's share of 2**e. Three to five fine bins make one; what one holds that an edge cuts is
    taken to lie evenly in it.
    """
    cumulative = np.concatenate((np.zeros((len(fine), 1)), fine.cumsum(axis=1)), axis=1)
    edges = np.nan_to_num(extent)[:, None] * FINE_BINS * np.arange(BINS + 1) / BINS
    below = edges.astype(np.int64)
    share = edges - below
    at = np.take_along_axis(cumulative, below, axis=1)
    above = np.take_along_axis(cumulative, np.minimum(below + 1, FINE_BINS), axis=1)
    reached = np.rint(at + share * (above - at)).astype(np.int64)
    reached[:, -1] = cumulative[:, -1]  # the maximum itself lies in the last bin
    return np.diff(reached, axis=1)
