"""Reading and editing the residual stream, with both libraries behind the model."""

import gc
import weakref

import pytest
import torch
from small_models import without_cache

from mistral_sae.model.hooks import HookError, edit_residual, read_residuals
from mistral_sae.model.language_model import load_model


@pytest.fixture(scope="module", params=["mistral_folder", "hugging_face_folder"])
def model(request):
    return load_model(request.getfixturevalue(request.param), device="cpu")


def hooks_left(model) -> int:
    return sum(len(model.block(layer)._forward_hooks) for layer in range(model.n_layers))


def test_the_forward_stops_after_the_layer_that_is_read(model, tokens_BT):
    ran = []
    handles = [
        model.block(layer).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in range(model.n_layers)
    ]
    after = []
    with read_residuals(model, [1]) as residuals:
        model.forward(tokens_BT)
        after.append("never reached")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert after == []
    assert residuals[1].shape == (3, 12, 32)


def test_what_was_read_is_freed_without_the_garbage_collector(model, tokens_BT):
    gc.disable()
    try:
        value = weakref.ref(model.residuals(tokens_BT, 1))
        assert value() is None
    finally:
        gc.enable()


def test_hooks_are_gone_after_an_exception(model, tokens_BT):
    def fails(x_BTD):
        raise ZeroDivisionError

    for context in (read_residuals(model, [1]), edit_residual(model, 1, lambda x: x)):
        with pytest.raises(KeyError), context:
            raise KeyError
        assert hooks_left(model) == 0
    with pytest.raises(ZeroDivisionError), edit_residual(model, 1, fails):
        model.forward(tokens_BT)
    assert hooks_left(model) == 0


def test_a_reader_that_never_fired_says_so(model):
    with pytest.raises(HookError, match="layer 1 was not read"), read_residuals(model, [1]):
        pass


def test_an_edit_that_never_fired_says_so(model):
    with pytest.raises(HookError, match="layer 1 was not edited"), edit_residual(model, 1, lambda x: x):
        model.generate([1, 50], 3)  # a generator nobody consumes inside the block


def test_the_identity_edit_changes_no_logit(model, tokens_BT):
    plain = model.forward(tokens_BT)
    with edit_residual(model, 1, lambda x_BTD: x_BTD):
        assert torch.equal(model.forward(tokens_BT), plain)


def test_an_edit_shows_in_later_layers_and_not_in_earlier_ones(model, tokens_BT):
    plain = [model.residuals(tokens_BT, layer) for layer in range(3)]
    with edit_residual(model, 1, lambda x_BTD: x_BTD + 1):
        edited = [model.residuals(tokens_BT, layer) for layer in range(3)]
    assert torch.equal(edited[0], plain[0])
    torch.testing.assert_close(edited[1], plain[1] + 1)
    assert (edited[2] - plain[2]).abs().amax(-1).min() > 0.1


def test_edits_of_one_layer_apply_in_the_order_of_entry(model, tokens_BT):
    plain = model.residuals(tokens_BT, 1)
    with (
        edit_residual(model, 1, lambda x: x + 1),
        edit_residual(model, 1, lambda x: x * 2),
        read_residuals(model, [1]) as residuals,
    ):
        model.forward(tokens_BT)
    torch.testing.assert_close(residuals[1], (plain + 1) * 2)


@pytest.mark.parametrize(("first_position", "seen"), [(0, [4, 1, 1]), (1, [3, 1, 1]), (4, [1, 1]), (5, [1]), (9, [])])
def test_an_edit_sees_every_position_from_the_first_on_once(model, first_position, seen):
    lengths = []

    def record(x_BTD):
        lengths.append(x_BTD.shape[1])
        return x_BTD

    with edit_residual(model, 1, record, first_position=first_position):
        assert len(list(model.generate([1, 50, 60, 70], 3))) == 3
    assert lengths == seen


def test_positions_before_the_first_are_left_as_they_are(model, tokens_BT):
    plain = model.residuals(tokens_BT, 1)
    with edit_residual(model, 1, lambda x: x + 1, first_position=5):
        edited = model.residuals(tokens_BT, 1)
    assert torch.equal(edited[:, :5], plain[:, :5])
    assert torch.equal(edited[:, 5:], plain[:, 5:] + 1)


def test_special_tokens_are_left_as_they_are_where_an_edit_is_not_for_them(model, tokens_BT):
    tokens_BT[1, 4] = model.tokenizer.bos_id
    plain = model.residuals(tokens_BT, 1)
    with edit_residual(model, 1, lambda x: x + 1, first_position=2, special=False):
        edited = model.residuals(tokens_BT, 1)
    changed = (edited != plain).any(dim=-1)
    expected = torch.ones(3, 12, dtype=torch.bool)
    expected[:, :2] = expected[1, 4] = False
    assert torch.equal(changed, expected)


def test_several_layers_are_read_in_one_forward(model, tokens_BT):
    ran = []
    handle = model.block(2).register_forward_hook(lambda *_: ran.append(2))
    with read_residuals(model, [1, 0]) as residuals:
        model.forward(tokens_BT)
    handle.remove()
    assert ran == []
    assert residuals.keys() == {0, 1}
    assert all(torch.equal(residuals[layer], model.residuals(tokens_BT, layer)) for layer in residuals)


def test_edited_text_is_the_same_with_the_cache_on_and_off(model):
    direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))

    plain = list(model.generate([1, 50, 60], 12))
    with edit_residual(model, 1, lambda x_BTD: x_BTD + direction, first_position=3):
        with_cache = list(model.generate([1, 50, 60], 12))
        without = without_cache(model, [1, 50, 60], 12)
    assert with_cache == without
    assert with_cache != plain
    assert list(model.generate([1, 50, 60], 12)) == plain


def test_an_edit_of_another_shape_is_an_error(model, tokens_BT):
    with (
        pytest.raises(HookError, match=r"returned \(3, 1, 32\), expected \(3, 12, 32\)"),
        edit_residual(model, 1, lambda x_BTD: x_BTD[:, :1]),
    ):
        model.forward(tokens_BT)


def test_an_edit_in_float32_fits_a_model_in_bfloat16(mistral_folder, tokens_BT):
    model = load_model(mistral_folder, device="cpu", dtype="bfloat16")
    with edit_residual(model, 1, lambda x_BTD: x_BTD.float()):
        assert model.forward(tokens_BT).dtype == torch.float32
    assert model.residuals(tokens_BT, 1).dtype == torch.bfloat16
