"""A small corpus of random activations that are known, a model that says which row it reads and what encodes it."""

from types import SimpleNamespace

import numpy as np
import torch

from mistral_sae.data.records import Document
from mistral_sae.data.tokens import pack
from mistral_sae.explain import cache
from mistral_sae.explain.cache import is_for_scoring
from mistral_sae.explain.examples import Settings
from mistral_sae.sae.autoencoder import Encoded

T, F, K = 24, 12, 4
SETTINGS = Settings(top=4, spread=4, held_out=3, left=6, right=3, seed=5)
MADE_FROM = {"format": 1, "autoencoder": "a", "model": "b", "corpus": {}}


class Letters:
    """A tokenizer of one token a character, with the BOS that a test can see: 0."""

    bos_id, eos_id = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]


def kept(tokens_BT):
    """As LanguageModel says it: not the first position, nor BOS and EOS."""
    return (tokens_BT > Letters.eos_id) & (torch.arange(tokens_BT.shape[1]) > 0)


class Corpus:
    """Random rows of documents of all lengths, and random activations, larger and larger ones as it goes on.

    It is its own model and autoencoder: a residual is the row's number and the position.
    """

    tokenizer, n_features, activation = Letters(), F, "topk"
    W_dec = torch.empty(0)  # which says on which device it is

    def __init__(self, n_documents=120, seed=0):
        random = np.random.default_rng(seed)
        contents = [
            "".join(chr(97 + i) for i in random.integers(0, 26, n)) for n in random.integers(1, 60, n_documents)
        ]
        documents = [Document(f"document {i}", text) for i, text in enumerate(contents)]
        self.rows = list(pack(documents, Letters(), T))
        shape = (len(self.rows), T)
        # Feature 0 fires often, the last hardly ever
        chance = random.exponential(size=(*shape, F)) / np.geomspace(1, 0.002, F)
        self.indices = torch.from_numpy(chance.argsort(axis=-1)[..., :K].copy())
        growth = np.geomspace(0.1, 8, len(self.rows))[:, None, None]
        values = growth * random.exponential(size=(*shape, K)) * (random.random((*shape, K)) < 0.7)
        values = np.ceil(8 * values) / 8  # so that some are equal
        values[:, 0] = 1000.0  # the first position, which has to be ignored
        values[values == 0] = -1.0  # as an encoder without relu may give
        self.values = torch.from_numpy(values).float()
        self.read = 0  # rows that went through the model

    def kept(self, tokens_BT):
        return kept(tokens_BT)

    def check_finite(self, numbers, what):
        assert numbers.isfinite().all()

    def residuals(self, tokens_BT, layer):
        self.read += len(tokens_BT)
        by_tokens = {row.tokens.astype(np.int64).tobytes(): i for i, row in enumerate(self.rows)}
        rows = torch.tensor([by_tokens[row.numpy().tobytes()] for row in tokens_BT])
        return torch.stack((rows.unsqueeze(1).expand(-1, T), torch.arange(T).expand(len(rows), -1)), dim=2)

    def encode(self, x_ND, bf16):
        row, position = x_ND.unbind(dim=1)
        return Encoded(self.values[row, position], self.indices[row, position], row, row)

    def write(self, folder, rows=None, rows_per_forward=5):
        cache.write(folder, MADE_FROM, self.rows if rows is None else rows, self, self, 0, rows_per_forward)

    def cached(self, folder, **options):
        """The cache of all rows."""
        self.write(folder, **options)
        found, why = cache.open_cache(folder, MADE_FROM)
        assert why == ""
        return found

    # ---- what has to be found, by a search through everything ----

    def activations(self, feature):
        """A feature's activations on all tokens that count, (rows, T), as float16 holds them."""
        values = torch.where(self.indices == feature, self.values, 0).clamp_min(0).half().float().sum(dim=-1).numpy()
        places = np.stack([row.document_of for row in self.rows])
        return np.where(places >= 0, values, 0.0) * (np.arange(T) > 0)

    def window(self, row, position):
        """First and last position of the window around a token."""
        places = self.rows[row].document_of
        first = last = position
        while first > max(1, position - SETTINGS.left) and places[first - 1] == places[position]:
            first -= 1
        while last < min(T - 1, position + SETTINGS.right) and places[last + 1] == places[position]:
            last += 1
        return first, last

    def document(self, row, position):
        return self.rows[row].documents[self.rows[row].document_of[position]]

    def peaks(self, feature, scoring=None):
        """All (value, row, position) that are the largest of their windows, in the order of the text."""
        values = self.activations(feature)
        found = []
        for row, position in zip(*values.nonzero(), strict=True):
            first, last = self.window(row, position)
            of_kind = scoring is None or is_for_scoring(self.document(row, position)) == scoring
            if of_kind and values[row, first : last + 1].max() == values[row, position]:
                found.append((float(values[row, position]), int(row), int(position)))
        return found


def cache_of(folder, rows, values_BTK, indices_BTK, n_features):
    """The cache of rows with these activations."""
    corpus = Corpus.__new__(Corpus)
    corpus.rows, corpus.values, corpus.indices, corpus.read, corpus.n_features = (
        rows,
        values_BTK,
        indices_BTK,
        0,
        n_features,
    )
    width = len(rows[0].tokens)

    def residuals(tokens_BT, layer):
        first = corpus.read
        corpus.read += len(tokens_BT)
        number = torch.arange(first, corpus.read).unsqueeze(1).expand(-1, width)
        return torch.stack((number, torch.arange(width).expand(len(tokens_BT), -1)), dim=2)

    model = SimpleNamespace(residuals=residuals, kept=kept, check_finite=corpus.check_finite)
    cache.write(folder, MADE_FROM, rows, model, corpus, 0, 64)
    return cache.open_cache(folder, MADE_FROM)[0]
