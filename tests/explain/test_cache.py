"""The cache of activations, against a search through all activations of a small corpus."""

import gc
import itertools
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from synthetic_activations import MADE_FROM, Corpus, F, K, Letters, T

from mistral_sae.cli import UserError
from mistral_sae.data.records import Document
from mistral_sae.data.tokens import pack
from mistral_sae.distributed import Group
from mistral_sae.explain import cache
from mistral_sae.explain.cache import active, is_for_scoring, made_from, open_cache
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import Encoded, SparseAutoencoder
from mistral_sae.sae.checkpoint import hash_of_sae

PER_SHARD = 30  # rows


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD_TOKENS", PER_SHARD * T + 7)


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what it holds ----


def test_every_activation_is_in_the_cache_in_the_order_of_the_text(corpus, tmp_path):
    found = corpus.cached(tmp_path)
    assert len(found.shards) == -(-len(corpus.rows) // PER_SHARD) > 2
    assert found.rows == len(corpus.rows)
    assert found.tokens == sum(int((row.document_of[1:] >= 0).sum()) for row in corpus.rows)
    for feature in range(F):
        values = corpus.activations(feature)
        of_feature = found.activations(feature)
        assert of_feature.tokens.tolist() == values.ravel().nonzero()[0].tolist()
        assert of_feature.values.tolist() == values[values > 0].tolist()
        assert found.counts_F[feature] == (values > 0).sum()
        assert found.maxima_F[feature].item() == values.max()
    assert found.counts_F.sum() > 2000


def test_an_activation_knows_its_document_and_how_far_that_goes_in_the_row(corpus, tmp_path):
    found = corpus.cached(tmp_path)
    of_feature = found.activations(0)
    for token, first, last, document in zip(*(array.tolist() for array in of_feature[:4]), strict=True):
        row, position = divmod(token, T)
        assert found.names[document] == corpus.document(row, position)
        own = corpus.rows[row].document_of == corpus.rows[row].document_of[position]
        own[0] = False
        assert (first % T, last % T) == (own.nonzero()[0][0], own.nonzero()[0][-1])
        assert found.ids(first, last) == corpus.rows[row].tokens[own].tolist()


def test_some_shards_alone_can_be_read(corpus, tmp_path):
    found = corpus.cached(tmp_path)
    every, some = found.activations(0), found.activations(0, [1])
    inside = (every.tokens // (PER_SHARD * T)) == 1
    assert some.tokens.tolist() == every.tokens[inside].tolist()


def test_first_positions_and_special_tokens_have_no_activations(tmp_path):
    """BOS and EOS are told by their ids: here a document has them in its text."""
    corpus = Corpus(10)
    corpus.rows = [row._replace(tokens=row.tokens.copy()) for row in corpus.rows]
    for row in corpus.rows:
        row.tokens[[5, 9]] = Letters.bos_id, Letters.eos_id
    corpus.values = corpus.values.abs()
    found = corpus.cached(tmp_path)
    positions = {token % T for feature in range(F) for token in found.activations(feature).tokens.tolist()}
    assert positions == set(range(T)) - {0, 5, 9}


def test_activations_beyond_float16_are_stored_as_its_largest(tmp_path):
    corpus = Corpus(10)
    corpus.values *= 1e6
    assert corpus.cached(tmp_path).maxima_F.max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("rows_per_forward", [1, 7, 1000])
def test_how_many_rows_the_model_reads_at_a_time_changes_nothing(corpus, tmp_path, rows_per_forward):
    corpus.write(tmp_path / "a")
    corpus.write(tmp_path / "b", rows_per_forward=rows_per_forward)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_zeros_beside_the_active_features_change_nothing(corpus, tmp_path):
    """An autoencoder without a fixed K gives as many columns as a batch needs."""

    class Wider(Corpus):
        def encode(self, x_ND, bf16):
            pad = torch.nn.functional.pad
            values, indices, *rest = super().encode(x_ND, bf16)
            more = len(x_ND) % 3
            return Encoded(pad(values, (more, 0)), pad(indices, (more, 0)), *rest)

    corpus.write(tmp_path / "a")
    Wider().write(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_half_of_the_documents_are_for_scoring_held_out_of_training_or_not():
    from mistral_sae.data.tokens import is_held_out

    ids = [f"file {i}.py" for i in range(4000)]
    for held_out in (True, False):
        part = [is_for_scoring(i) for i in ids if is_held_out(i, 0.5) == held_out]
        assert 0.45 < np.mean(part) < 0.55


def test_a_corpus_of_nothing_is_refused_before_anything_is_deleted(corpus, tmp_path):
    corpus.write(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="not one row"):
        cache.write(tmp_path, {"other": 1}, [], corpus, corpus, 0)
    assert files_of(tmp_path) == before


# ---- a pass that ends early ----


@pytest.mark.parametrize("stop", [3, PER_SHARD, 2 * PER_SHARD + 8, 140])
def test_a_pass_that_was_cut_off_goes_on_and_ends_with_the_same_files(corpus, tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    corpus.write(whole)

    def cut_off():
        yield from corpus.rows[:stop]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.write(parts, rows=cut_off())
    n_whole = stop // PER_SHARD
    assert open_cache(parts, MADE_FROM) == (
        None,
        f"the pass that wrote {parts} was cut off: going on after {n_whole} shards",
    )
    left = parts / f"{n_whole:05}.safetensors.partial"  # as a machine that lost power leaves it
    left.mkdir()
    (left / ".tmp123").write_bytes(b"half")
    before = corpus.read
    corpus.write(parts)
    assert corpus.read - before == len(corpus.rows) - n_whole * PER_SHARD
    assert files_of(parts) == files_of(whole)


def test_damaged_shards_are_made_again(corpus, tmp_path):
    corpus.write(tmp_path)
    whole = files_of(tmp_path)
    path = tmp_path / "00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found, why = open_cache(tmp_path, MADE_FROM)
    assert (found, why) == (None, f"the cache in {tmp_path} is damaged: made again from shard 2 on")
    corpus.write(tmp_path)
    assert files_of(tmp_path) == whole


def test_a_cache_without_a_manifest_is_made_again(corpus, tmp_path):
    corpus.write(tmp_path)
    (tmp_path / cache.MANIFEST).write_text("{")
    assert open_cache(tmp_path, MADE_FROM) == (None, f"the cache in {tmp_path} is damaged: made again")
    before = corpus.read
    assert corpus.cached(tmp_path) is not None
    assert corpus.read - before == len(corpus.rows)


def test_a_pass_takes_no_more_memory_for_a_longer_corpus(corpus, tmp_path):
    def peak(shards):
        """The most bytes of tensors while the pass goes on, and of arrays."""
        tensors = []

        class Watched(Corpus):
            def encode(self, x_ND, bf16):
                alive = (each for each in gc.get_objects() if type(each) is torch.Tensor)
                tensors.append(sum(tensor.nbytes for tensor in alive))
                return super().encode(x_ND, bf16)

        watched = Watched()
        gc.collect()
        tracemalloc.start()
        watched.write(tmp_path / str(shards), rows=itertools.islice(corpus.rows, shards * PER_SHARD))
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return max(tensors) - tensors[0], arrays

    few, many = peak(2), peak(5)
    assert few[0] > 10 * PER_SHARD * T
    assert many[0] < 1.1 * few[0]
    assert many[1] < 1.1 * few[1]


# ---- what it was made from ----


def test_a_cache_of_another_making_is_deleted_by_a_new_pass(corpus, tmp_path):
    corpus.write(tmp_path)
    changed = MADE_FROM | {"corpus": {"rows": 3}}
    cache.write(tmp_path, changed, corpus.rows[:3], corpus, corpus, 0)
    assert sorted(files_of(tmp_path)) == ["00000.safetensors", cache.MANIFEST]
    assert open_cache(tmp_path, changed)[0].rows == 3


@pytest.fixture(scope="module")
def parts(mistral_folder):
    model = load_model(mistral_folder, device="cpu")
    sae = SparseAutoencoder(model.d_model, 64, 4)
    sae.initialize(torch.randn(64, model.d_model, generator=torch.Generator().manual_seed(0)), seed=0)
    documents = [Document(f"text {i}", f"def square_{i}(x):\n    return x * x + {i} " * (i % 5 + 2)) for i in range(30)]
    return model, sae, list(pack(documents, model.tokenizer, 32))


def test_what_was_made_from_anything_else_is_not_used(parts, tmp_path):
    model, sae, rows = parts
    corpus = {"path": "x", "rows": 10}
    assert open_cache(tmp_path, made_from(model, sae, 1, corpus)) == (None, "")
    cache.write(tmp_path, made_from(model, sae, 1, corpus), rows, model, sae, 1)

    def refused(sae=sae, layer=1, corpus=corpus):
        found, why = open_cache(tmp_path, made_from(model, sae, layer, corpus))
        assert found is None
        assert "\n" not in why
        return why

    other = SparseAutoencoder(model.d_model, 64, 4)
    other.load_state_dict(sae.state_dict())
    assert open_cache(tmp_path, made_from(model, other, 1, corpus))[0] is not None
    other.W_enc.data[3, 60] += 1e-4
    assert refused(sae=other) == f"the cache in {tmp_path} is of another autoencoder: made again"
    wider = SparseAutoencoder(model.d_model, 64, 5)
    wider.load_state_dict(sae.state_dict())
    assert "another autoencoder:" in refused(sae=wider)
    assert "another model:" in refused(layer=0)
    assert "another corpus, or another part of it:" in refused(corpus=corpus | {"rows": 11})
    assert "another model and another corpus" in refused(layer=0, corpus={})
    weight = next(iter(model.block(1).parameters()))
    before = weight.data.flatten()[-1].clone()
    weight.data.view(-1)[-1] += 1
    try:
        assert "another model:" in refused()
    finally:
        weight.data.view(-1)[-1] = before


def test_a_cache_of_an_autoencoder_is_opened_whatever_corpus_it_is_of_but_not_in_another_format(
    parts, tmp_path, monkeypatch
):
    model, sae, rows = parts
    cache.write(tmp_path, made_from(model, sae, 1, {"path": "x"}), rows, model, sae, 1)
    assert cache.open_of(tmp_path, hash_of_sae(sae)).rows == len(rows)
    assert cache.open_of(tmp_path, "another") is None
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert cache.open_of(tmp_path, hash_of_sae(sae)) is None


def test_whose_autoencoder_a_cache_is_of_can_be_asked(corpus, tmp_path):
    assert cache.is_of(tmp_path, "a")  # nothing says otherwise
    corpus.write(tmp_path)
    assert cache.is_of(tmp_path, "a")
    assert not cache.is_of(tmp_path, "b")


def test_a_note_is_kept_until_the_cache_is_made_again(corpus, tmp_path):
    corpus.write(tmp_path)
    assert cache.noted(tmp_path) is None
    cache.note(tmp_path, {"left": 3})
    assert cache.noted(tmp_path) == {"left": 3}
    assert open_cache(tmp_path, MADE_FROM)[0] is not None
    changed = json.loads(json.dumps(MADE_FROM | {"model": "c"}))
    cache.write(tmp_path, changed, corpus.rows, corpus, corpus, 0)
    assert cache.noted(tmp_path) is None


# ---- several ranks ----


def test_two_ranks_write_the_files_of_one_a_shard_in_turn(corpus, tmp_path):
    barrier = threading.Barrier(2, timeout=60)
    alone, together = tmp_path / "alone", tmp_path / "together"
    corpus.write(alone)

    class Rank(Group):
        def wait(self):
            barrier.wait()

    def write(rank):
        cache.write(together, MADE_FROM, corpus.rows, corpus, corpus, 0, ranks=Rank(2, rank))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert len(files_of(together)) > 3
    assert files_of(together) == files_of(alone)


# ---- with a model ----


def test_activations_are_those_of_the_autoencoder_on_the_layers_residuals(parts, tmp_path):
    model, sae, rows = parts
    described = made_from(model, sae, 1, {})
    cache.write(tmp_path, described, rows, model, sae, 1, rows_per_forward=4)
    found, _ = open_cache(tmp_path, described)
    with torch.no_grad():
        acts = sae.encode(torch.cat([model.residuals(torch.from_numpy(r.tokens)[None], 1) for r in rows])).dense(64)
    acts[torch.from_numpy(np.stack([row.document_of for row in rows])) < 0] = 0
    torch.testing.assert_close(found.maxima_F, acts.flatten(0, 1).amax(dim=0), rtol=1e-3, atol=1e-4)
    assert (found.counts_F - (acts > 0).flatten(0, 1).sum(dim=0)).abs().max() <= 1
    assert found.counts_F.sum() > 1000


@pytest.mark.parametrize("kind", [{"activation": "relu"}, {"activation": "jumprelu"}, {"normalize": "none"}])
def test_what_others_trained_is_encoded_as_it_encodes(parts, kind):
    model, _, rows = parts
    sae = SparseAutoencoder(model.d_model, 64, 4, **kind)
    sae.initialize(torch.zeros(1, model.d_model), seed=0)
    tokens_BT = torch.from_numpy(np.stack([row.tokens for row in rows[:3]], dtype=np.int64))
    counts_BT = torch.from_numpy(np.stack([row.document_of for row in rows[:3]]) >= 0)
    token, feature, value = active(model, sae, 1, tokens_BT, counts_BT)
    dense = torch.zeros(96, 64)
    dense[token, feature] = value.float()
    with torch.no_grad():
        wanted = sae.encode(model.residuals(tokens_BT, 1)).dense(64)
    torch.testing.assert_close(dense.view(3, 32, 64), wanted * counts_BT.unsqueeze(2), rtol=1e-3, atol=1e-4)


def test_what_a_bos_would_activate_is_not_encoded(corpus):
    """An autoencoder without a K may have all its features active on a first position."""
    seen = []

    class Sae(Corpus):
        activation = "relu"

        def encode(self, x_ND, bf16):
            seen.extend(x_ND[:, 1].tolist())
            return super().encode(x_ND, bf16)

    tokens_BT = torch.from_numpy(np.stack([row.tokens for row in corpus.rows[:4]], dtype=np.int64))
    counts_BT = torch.arange(T).expand(4, -1) > 2
    token, _, _ = active(corpus, Sae(), 0, tokens_BT, counts_BT)
    assert seen == [*range(3, T)] * 4
    assert token.min() == 3
    assert token.tolist() == sorted(token.tolist())
    assert len(token) <= len(seen) * K


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_writes_the_shard_that_a_cpu_does(corpus, tmp_path):
    class OnGpu(Corpus):
        W_dec = torch.empty(0, device="cuda")

        def residuals(self, tokens_BT, layer):
            return super().residuals(tokens_BT, layer).cuda()

        def encode(self, x_ND, bf16):
            return Encoded(*(tensor.cuda() for tensor in super().encode(x_ND.cpu(), bf16)))

    corpus.write(tmp_path / "cpu")
    OnGpu().write(tmp_path / "gpu")
    assert files_of(tmp_path / "cpu") == files_of(tmp_path / "gpu")


def test_an_interrupted_pass_leaves_the_model_as_it_was(parts, tmp_path):
    model, sae, rows = parts
    tokens = torch.from_numpy(rows[0].tokens)[None]
    before = model.forward(tokens)

    def interrupted():
        yield from itertools.islice(rows, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(tmp_path, made_from(model, sae, 1, {}), interrupted(), model, sae, 1, rows_per_forward=2)
    assert torch.equal(model.forward(tokens), before)
