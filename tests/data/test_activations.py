"""Shuffled batches of residuals: nothing lost, nothing twice, in an order that can be repeated and resumed."""

import gc
from itertools import islice

import numpy as np
import pytest
import torch

from mistral_sae.data.activations import residuals_of, shuffled_batches
from mistral_sae.data.place import Place
from mistral_sae.data.tokens import Row
from mistral_sae.model.language_model import load_model

T = 6  # 5 residuals a row
D = 7


class Counting:
    """A model whose residual holds the token itself, so that each can be told from the others."""

    device, dtype, d_model = torch.device("cpu"), torch.float64, D

    def __init__(self, special=()):
        self.special = list(special)
        self.rows = []  # first token of every row that went through
        self.layers = set()

    def kept(self, tokens_RT):
        """All but the first position and the tokens of `special`."""
        return (torch.arange(tokens_RT.shape[1]) > 0) & ~torch.isin(tokens_RT, torch.tensor(self.special))

    def residuals_by_layer(self, tokens_RT, layers):
        self.rows += tokens_RT[:, 0].tolist()
        self.layers |= set(layers)
        return {layer: tokens_RT.unsqueeze(-1).expand(-1, -1, D).double() + (layer - 1) * 1000 for layer in layers}


def stream(n_rows):
    """Rows of tokens that count up from 0."""
    return as_rows(np.arange(n_rows * T).reshape(n_rows, T))


def as_rows(tokens_RT):
    """Rows that know their number, as `record` of their place."""
    return (Row(tokens, np.zeros(T), [], Place(record=i)) for i, tokens in enumerate(tokens_RT))


def whole_batches(n_rows=23, model=None, rows=None, **changed):
    options = {"batch_size": 8, "buffer_tokens": 27, "rows_per_forward": 2, "seed": 0} | changed
    rows = stream(n_rows) if rows is None else rows
    return [(x[:, 0].long(), place) for x, place in shuffled_batches(rows, model or Counting(), 1, **options)]


def batches_of(**options):
    return [tokens for tokens, _ in whole_batches(**options)]


def batches_after(place, model=None, **options):
    """The batches after a place, of the rows from there on."""
    rows = islice(stream(23), place.record, None)
    return batches_of(rows=rows, model=model or Counting(), start=place, **options)


SIZES = [(8, 27), (7, 11), (5, 5), (64, 13), (13, 1000), (1, 27), (30, 30), (41, 20)]


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), SIZES)
def test_every_residual_but_the_first_of_each_row_comes_once(batch_size, buffer_tokens):
    found = batches_of(batch_size=batch_size, buffer_tokens=buffer_tokens)
    assert {len(batch) for batch in found} == {batch_size}
    tokens = torch.cat(found)
    expected = np.arange(23 * T).reshape(23, T)[:, 1:].flatten()
    assert len(tokens) == len(expected) // batch_size * batch_size  # what does not fill a batch at the end is left
    assert len(tokens.unique()) == len(tokens)
    assert np.isin(tokens.numpy(), expected).all()
    assert not (tokens % T == 0).any()


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), SIZES)
def test_the_place_of_a_batch_gives_exactly_the_batches_after_it(batch_size, buffer_tokens):
    sizes = {"batch_size": batch_size, "buffer_tokens": buffer_tokens}
    whole = whole_batches(**sizes)
    for number, (_, place) in enumerate(whole, 1):
        rest = batches_after(place, **sizes)
        assert all(torch.equal(a, b) for (a, _), b in zip(whole[number:], rest, strict=True))


def test_going_on_runs_the_model_over_no_row_of_an_earlier_buffer():
    model = Counting()
    place = whole_batches(batch_size=8, buffer_tokens=27)[6][1]  # 56 residuals: two buffers of five rows
    batches_after(place, model=model, batch_size=8, buffer_tokens=27)
    assert model.rows[0] == 10 * T


SPECIAL = [1, 2, 8, 17, *range(30, 36), 50, 100, 137]  # of them a row and the ends of the stream


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), SIZES)
def test_special_tokens_are_left_out_and_batches_keep_their_size_and_their_place(batch_size, buffer_tokens):
    sizes = {"batch_size": batch_size, "buffer_tokens": buffer_tokens}
    whole = whole_batches(model=Counting(SPECIAL), **sizes)
    assert {len(batch) for batch, _ in whole} == {batch_size}
    tokens = torch.cat([batch for batch, _ in whole])
    n_kept = 23 * (T - 1) - len([token for token in SPECIAL if token % T])
    assert len(tokens) == n_kept // batch_size * batch_size
    assert len(tokens.unique()) == len(tokens)
    assert not np.isin(tokens.numpy(), SPECIAL).any()
    for number, (_, place) in enumerate(whole, 1):
        rest = batches_after(place, model=Counting(SPECIAL), **sizes)
        assert all(torch.equal(a, b) for (a, _), b in zip(whole[number:], rest, strict=True))


def test_residuals_are_shuffled_within_a_buffer_and_never_across():
    tokens = torch.cat(batches_of(batch_size=5, buffer_tokens=25, n_rows=20))
    for number, buffer in enumerate(tokens.split(25)):
        assert ((buffer // (5 * T)) == number).all()
        assert not torch.equal(buffer, buffer.sort().values)
    first, second = tokens[:25] % (5 * T), tokens[25:50] % (5 * T)
    assert not torch.equal(first, second)  # each buffer has a permutation of its own


def test_the_order_depends_on_the_seed_and_the_position_alone():
    torch.manual_seed(1)
    first = batches_of()
    torch.manual_seed(2)
    again = batches_of(rows_per_forward=3)  # nor on how the model runs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = batches_of(seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_batch_size_does_not_change_the_order():
    assert torch.equal(torch.cat(batches_of(batch_size=5)), torch.cat(batches_of(batch_size=23)))


def test_the_model_runs_rows_per_forward_rows_at_a_time_and_only_the_layer_asked_for():
    model, sizes = Counting(), []
    run = model.residuals_by_layer
    model.residuals_by_layer = lambda tokens, layers: (sizes.append(len(tokens)), run(tokens, layers))[1]
    batches_of(model=model, rows_per_forward=3, buffer_tokens=35)  # seven rows a buffer
    assert sizes[:3] == [3, 3, 1]
    assert model.layers == {1}


def test_an_empty_stream_has_no_batches():
    assert batches_of(rows=iter([])) == []


def test_a_buffer_that_cannot_hold_a_row_is_an_error():
    with pytest.raises(ValueError, match="at least one row of 5 residuals: found 4"):
        batches_of(buffer_tokens=4)


def live_residuals():
    """Residuals that some tensor keeps in memory, each storage once."""
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim and t.shape[-1] == D]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) // (8 * D)


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), [(40, 200), (30, 100), (64, 100), (300, 100)])
def test_no_more_than_a_buffer_and_a_batch_is_alive(batch_size, buffer_tokens):
    model, while_filling, while_training = Counting(), [], []
    run = model.residuals_by_layer

    def residuals(tokens_RT, layers):
        while_filling.append(live_residuals())
        return run(tokens_RT, layers)

    model.residuals_by_layer = residuals
    options = {"batch_size": batch_size, "buffer_tokens": buffer_tokens, "rows_per_forward": 2, "seed": 0}
    gc.collect()
    gc.freeze()  # leaves what the tests before made out of `get_objects`
    try:
        for x, _ in shuffled_batches(stream(200), model, 0, **options):
            while_training.append(live_residuals())
            del x
    finally:
        gc.unfreeze()
    assert buffer_tokens <= max(while_training) <= buffer_tokens + batch_size
    assert max(while_filling) <= buffer_tokens + batch_size + 2 * T  # and the rows in the model


def test_the_residuals_are_those_of_the_language_model(mistral_folder, tokens_BT):
    model = load_model(mistral_folder, last_layer=1)
    expected = model.residuals(tokens_BT, 1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(residuals_of(model, tokens_BT, 1), expected)
    between = tokens_BT.clone()
    between[1, 4] = model.tokenizer.bos_id
    kept = model.residuals(between, 1)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(residuals_of(model, between, 1), torch.cat([kept[:14], kept[15:]]))

    options = {"batch_size": 11, "buffer_tokens": 24, "rows_per_forward": 1, "seed": 0}
    found = torch.cat([x for x, _ in shuffled_batches(as_rows(tokens_BT.numpy()), model, 1, **options)])
    assert len(found) == len(expected) == 33
    distances = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-5 * expected.norm(dim=1).mean()
    assert distances.argmin(dim=1).unique().numel() == len(expected)
