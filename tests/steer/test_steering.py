"""Edits of the residual along a feature's direction: their closed forms, and what they leave alone."""

from itertools import islice

import numpy as np
import pytest
import torch
from small_models import without_cache

from mistral_sae.data.tokens import Row
from mistral_sae.files import SAEError
from mistral_sae.model.hooks import HookError
from mistral_sae.model.language_model import ModelError, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import steering
from mistral_sae.steer.steering import (
    METHODS,
    Edit,
    SteeringError,
    Subject,
    make_edit,
    statistics_of,
    steer,
)

D, F, K, LAYER = 32, 64, 6, 1
CPU = torch.device("cpu")
RESID_POST = Metadata("tiny", f"blocks.{LAYER}.hook_resid_post", LAYER, True, 32, "text")


def autoencoder(activation="topk", normalize="layer_norm", center=True, seed=0) -> SparseAutoencoder:
    """Random weights, and decoder rows of many norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sae = SparseAutoencoder(D, F, K, activation=activation, normalize=normalize, center=center)
    sae.requires_grad_(False)
    sae.W_dec.copy_(normal(F, D) * (0.05 + torch.rand(F, 1, generator=generator)))
    sae.W_enc.copy_(sae.W_dec.T + 0.1 * normal(D, F))
    sae.b_enc.copy_(0.1 * normal(F))
    sae.b_dec.copy_(0.2 * normal(D))
    if activation == "jumprelu":
        sae.threshold.fill_(0.3)
    return sae


def loaded_of(sae: SparseAutoencoder, metadata: Metadata = RESID_POST) -> LoadedSAE:
    return LoadedSAE(sae, metadata, None, torch.full((sae.n_features,), 3.0))


def residuals() -> torch.Tensor:
    """(2, 9, D) about a mean that is not zero."""
    return 2 * torch.randn(2, 9, D, generator=torch.Generator().manual_seed(5)) + 0.5


@pytest.fixture(scope="module", params=["mistral_folder", "hugging_face_folder"])
def lm(request):
    return load_model(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedSAE:
    return loaded_of(autoencoder())


def hooks_left(lm) -> int:
    return sum(len(lm.block(layer)._forward_hooks) for layer in range(lm.n_layers))


def strong(method: str) -> float:
    """A coefficient that changes the text, in the unit of the method."""
    return {"clamp": 9.0, "add": 2.0, "raw": 40.0, "ablate": 0.0}[method]


# ---- closed forms ----


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm", "none"])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize(("method", "c"), [("clamp", 4.0), ("clamp", -2.5), ("ablate", 7.0)])
def test_clamping_decodes_the_features_with_some_set_to_c_and_adds_the_error_term(
    activation, normalize, center, method, c
):
    sae, x = autoencoder(activation, normalize, center), residuals()
    encoded = sae.encode(x)
    error = x - sae.decode(encoded)
    chosen = [int(encoded.indices[0, 0, 0]), int(encoded.indices[1, 3, 1]), 5]  # active somewhere, and one whatever

    dense = encoded.dense(F)
    dense[..., chosen] = c if method == "clamp" else 0.0
    expected = (dense @ sae.W_dec + sae.b_dec) * encoded.std + encoded.mean + error

    edit = make_edit(sae, dict.fromkeys(chosen, c), method, CPU, exact=True)
    torch.testing.assert_close(edit(x), expected, rtol=1e-4, atol=1e-4)
    assert (edit(x) - x).abs().amax(-1).max() > 0.1


def test_the_two_forms_differ_only_where_topk_silences_a_positive_pre_activation():
    sae, x = autoencoder(), residuals()
    encoded = sae.encode(x)
    z, _, std = sae.standardize(x)
    pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
    dense = encoded.dense(F)
    silenced = (pre > 0) & (dense == 0)
    feature = int(silenced.flatten(0, 1).float().sum(0).argmax())
    assert 0 < silenced[..., feature].sum() < silenced[..., feature].numel()

    exact = make_edit(sae, {feature: 4.0}, "clamp", CPU, exact=True)(x)
    own = make_edit(sae, {feature: 4.0}, "clamp", CPU)(x)
    difference = (pre[..., feature] * silenced[..., feature]).unsqueeze(-1) * std * sae.W_dec[feature]
    torch.testing.assert_close(exact - own, difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_without_competition_both_forms_are_the_same(activation):
    sae, x = autoencoder(activation), residuals()
    forms = [make_edit(sae, {3: 2.0, 9: -1.0}, "clamp", CPU, exact=exact)(x) for exact in (True, False)]
    torch.testing.assert_close(*forms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.7, 6.0])
def test_a_clamped_feature_reads_c_where_nothing_interferes(c):
    sae = SparseAutoencoder(D, D, D, activation="relu", normalize="none").requires_grad_(False)
    rows, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))
    sae.W_dec.copy_(rows)  # orthonormal, and the encoder their transpose
    sae.W_enc.copy_(rows.T)
    sae.b_dec.fill_(0.3)
    x = residuals()
    before, after = sae.encode(x).dense(D), sae.encode(make_edit(sae, {4: c, 7: 1.5}, "clamp", CPU)(x)).dense(D)
    # Negative pre-activations count as 0 and stay in the residual as error: there the feature reads c less those
    z, _, _ = sae.standardize(x)
    missing = ((z - sae.b_dec) @ sae.W_enc).clamp(max=0)
    torch.testing.assert_close(after[..., 4], (c + missing[..., 4]).relu(), rtol=1e-4, atol=1e-4)
    is_active = before[..., 4] > 0
    assert is_active.any()
    torch.testing.assert_close(after[..., 4][is_active], torch.full((int(is_active.sum()),), c), rtol=1e-4, atol=1e-4)
    others = [i for i in range(D) if i not in (4, 7)]
    torch.testing.assert_close(after[..., others], before[..., others], rtol=1e-4, atol=1e-4)


def test_at_the_tokens_own_scale_a_feature_moves_by_the_product_of_its_two_rows():
    sae, x, feature, c = autoencoder(), residuals(), 11, 5.0
    z, mean, std = sae.standardize(x)
    edited = make_edit(sae, {feature: c}, "clamp", CPU)(x)
    pre = ((z - sae.b_dec) @ sae.W_enc + sae.b_enc)[..., feature]
    reread = ((((edited - mean) / (std + 1e-5)) - sae.b_dec) @ sae.W_enc + sae.b_enc)[..., feature]
    overlap = sae.W_dec[feature] @ sae.W_enc[:, feature]
    torch.testing.assert_close(reread, pre + (c - pre.relu()) * overlap, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("c", [0.5, -2.0])
def test_add_is_in_norms_of_the_residual_along_the_unit_direction(c):
    sae, x = autoencoder(), residuals()
    row = sae.W_dec[7]
    expected = x + c * x.norm(dim=-1, keepdim=True) * row / row.norm()
    torch.testing.assert_close(make_edit(sae, {7: c}, "add", CPU)(x), expected)


@pytest.mark.parametrize("c", [0.5, -2.0])
def test_raw_is_the_decoder_row_times_c(c):
    sae, x = autoencoder(), residuals()
    torch.testing.assert_close(make_edit(sae, {7: c}, "raw", CPU)(x), x + c * sae.W_dec[7])


@pytest.mark.parametrize("method", METHODS)
def test_several_features_at_once_change_by_the_sum_of_what_each_changes(method):
    sae, x = autoencoder(), residuals()
    each = [make_edit(sae, {feature: c}, method, CPU)(x) - x for feature, c in ((3, 2.0), (40, -1.0))]
    together = make_edit(sae, {3: 2.0, 40: -1.0}, method, CPU)(x) - x
    torch.testing.assert_close(together, each[0] + each[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_takes_one_coefficient_a_row_and_nan_leaves_a_row_as_it_is(method):
    sae, x = autoencoder(), residuals()[:1].expand(3, -1, -1)
    together = make_edit(
        sae, {3: torch.tensor([2.0, torch.nan, torch.nan]), 8: torch.tensor([torch.nan, -1.0, torch.nan])}, method, CPU
    )(x)
    torch.testing.assert_close(together[0], make_edit(sae, {3: 2.0}, method, CPU)(x[:1])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], make_edit(sae, {8: -1.0}, method, CPU)(x[:1])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(together[2], x[2])


def test_other_directions_take_an_edit_of_the_same_size():
    sae, x = autoencoder(), residuals()
    direction = torch.zeros(1, D)
    direction[0, 2] = sae.W_dec[9].norm()
    control = make_edit(sae, {9: 3.0}, "clamp", CPU, directions_SD=direction)(x) - x
    steered = make_edit(sae, {9: 3.0}, "clamp", CPU)(x) - x
    torch.testing.assert_close(control.norm(dim=-1), steered.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert (control[..., [i for i in range(D) if i != 2]] == 0).all()


# ---- what is left as it is ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficients", [{}, {3: None}, {3: None, 5: None}])
def test_without_coefficients_the_logits_are_those_of_the_model_bit_for_bit(
    lm, loaded, tokens_BT, method, coefficients
):
    plain = lm.forward(tokens_BT)
    with steer(lm, loaded, coefficients, method):
        assert torch.equal(lm.forward(tokens_BT), plain)
        assert hooks_left(lm) == 0


@pytest.mark.parametrize("method", ["add", "raw"])
def test_adding_nothing_leaves_the_logits_bit_for_bit(lm, loaded, tokens_BT, method):
    plain = lm.forward(tokens_BT)
    with steer(lm, loaded, {3: 0.0, 5: 0}, method):
        assert torch.equal(lm.forward(tokens_BT), plain)


def test_ablating_a_feature_that_is_silent_leaves_the_logits_bit_for_bit(lm, tokens_BT):
    sae = autoencoder()
    sae.b_enc[3] = -1000.0
    plain = lm.forward(tokens_BT)
    for method, c in (("ablate", 1.0), ("clamp", 0.0)):
        with steer(lm, loaded_of(sae), {3: c}, method):
            assert torch.equal(lm.forward(tokens_BT), plain)


def test_clamping_to_what_the_feature_is_leaves_the_logits(lm, tokens_BT):
    sae = autoencoder()
    sae.W_enc[:, 3] = 0.0  # so that it is the same on every token
    sae.b_enc[3] = 1.25
    plain = lm.forward(tokens_BT)
    with steer(lm, loaded_of(sae), {3: 1.25}):
        torch.testing.assert_close(lm.forward(tokens_BT), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_position", [1, 4])
def test_positions_before_the_first_are_never_edited(lm, tokens_BT, method, first_position):
    sae = autoencoder()
    sae.b_enc[3] = 40.0  # active, so that ablating it does something
    plain = lm.residuals(tokens_BT, LAYER)
    with steer(lm, loaded_of(sae), {3: strong(method)}, method, first_position=first_position):
        steered = lm.residuals(tokens_BT, LAYER)
    assert torch.equal(steered[:, :first_position], plain[:, :first_position])
    assert ((steered - plain)[:, first_position:].abs().amax(-1) > 1e-3).all()


# ---- while text is generated ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_position", [1, 3])
def test_steered_text_is_the_same_with_the_cache_on_and_off(lm, method, first_position):
    sae = autoencoder()
    sae.b_enc[3] = 40.0  # ablating it does something to the text
    options = {"method": method, "first_position": first_position}
    prompt = [1, 50, 60]
    with steer(lm, loaded_of(sae), {3: strong(method)}, **options):
        with_cache = list(lm.generate(prompt, 12))
        without = without_cache(lm, prompt, 12)
    assert with_cache == without
    assert with_cache != list(lm.generate(prompt, 12))


def test_steered_text_is_the_same_with_the_cache_on_and_off_for_every_kind_of_model(folders, loaded):
    for folder in folders:
        lm = load_model(folder, device="cpu")
        with steer(lm, loaded, {3: 9.0, 20: 4.0}):
            with_cache = list(lm.generate([1, 50, 60], 10))
            assert with_cache == without_cache(lm, [1, 50, 60], 10)
        assert with_cache != list(lm.generate([1, 50, 60], 10))


def test_steering_only_what_is_generated_leaves_the_first_token_as_it_is(lm, loaded):
    prompt = [1, 50, 60, 70]
    plain = list(lm.generate(prompt, 8))
    with steer(lm, loaded, {3: 12.0}, first_position=len(prompt)):
        generated_only = list(lm.generate(prompt, 8))
    with steer(lm, loaded, {3: 12.0}):
        everywhere = list(lm.generate(prompt, 8))
    assert generated_only[0] == plain[0]
    assert generated_only != plain
    assert everywhere != generated_only


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_steered_alike_alone_and_in_a_batch(lm, loaded, tokens_BT, method):
    with steer(lm, loaded, {3: strong(method), 12: 1.0}, method):
        batch = lm.forward(tokens_BT)
        for i in range(len(tokens_BT)):
            torch.testing.assert_close(lm.forward(tokens_BT[i : i + 1])[0], batch[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_both_libraries_are_steered_alike(mistral_folder, hugging_face_folder, loaded, tokens_BT, method):
    logits = []
    for folder in (mistral_folder, hugging_face_folder):
        lm = load_model(folder, device="cpu")
        with steer(lm, loaded, {3: strong(method), 12: 1.0}, method):
            logits.append(lm.forward(tokens_BT))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_a_bos_in_the_middle_and_what_else_is_excluded_are_not_steered(mistral_folder, loaded, tokens_BT):
    lm = load_model(mistral_folder, device="cpu", exclude_tokens=[77])
    tokens_BT[0, 4], tokens_BT[1, 6] = lm.tokenizer.bos_id, 77
    plain = lm.residuals(tokens_BT, LAYER)
    with steer(lm, loaded, {3: 9.0}):
        is_changed = (lm.residuals(tokens_BT, LAYER) != plain).any(dim=-1)
    assert torch.equal(is_changed, lm.kept(tokens_BT))


@pytest.mark.parametrize(("method", "c"), [("clamp", 9.0), ("add", 0.3), ("raw", 2.0)])
def test_a_model_in_bfloat16_is_steered_in_float32_and_stays_bfloat16(mistral_folder, loaded, tokens_BT, method, c):
    lm = load_model(mistral_folder, device="cpu", dtype="bfloat16")
    plain = lm.residuals(tokens_BT, LAYER)
    with steer(lm, loaded, {3: c}, method):
        steered = lm.residuals(tokens_BT, LAYER)
    expected = make_edit(loaded.sae, {3: c}, method, CPU)(plain.float()).bfloat16()
    assert steered.dtype == torch.bfloat16
    assert torch.equal(steered[:, 1:], expected[:, 1:])


# ---- contexts ----


def test_two_contexts_nest_and_the_inner_one_sees_what_the_outer_one_left(lm, loaded, tokens_BT):
    plain = lm.residuals(tokens_BT, LAYER)
    with steer(lm, loaded, {3: 9.0}):
        outer = lm.residuals(tokens_BT, LAYER)
        with steer(lm, loaded, {8: 0.5}, "add"):
            both = lm.residuals(tokens_BT, LAYER)
        assert torch.equal(lm.residuals(tokens_BT, LAYER), outer)
    assert torch.equal(lm.residuals(tokens_BT, LAYER), plain)
    expected = make_edit(loaded.sae, {8: 0.5}, "add", CPU)(outer)
    torch.testing.assert_close(both[:, 1:], expected[:, 1:])
    assert (both - outer)[:, 1:].abs().amax(-1).min() > 0.01


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_hook_is_gone_after_an_exception(lm, loaded, tokens_BT, error):
    plain = lm.forward(tokens_BT)

    def interrupted():
        with steer(lm, loaded, {3: 9.0}), steer(lm, loaded, {5: 1.0}, "raw"):
            for _ in lm.generate([1, 50, 60], 5):
                assert hooks_left(lm) == 2
                raise error

    with pytest.raises(error):
        interrupted()
    assert hooks_left(lm) == 0
    assert torch.equal(lm.forward(tokens_BT), plain)


def test_a_generator_that_is_consumed_after_the_block_was_not_steered_and_says_so(lm, loaded):
    with pytest.raises(HookError, match="was not edited"), steer(lm, loaded, {3: 9.0}):
        lm.generate([1, 50], 3)
    assert hooks_left(lm) == 0


# ---- what cannot be steered ----


@pytest.mark.parametrize(
    ("coefficients", "options", "words"),
    [
        ({64: 1.0}, {}, "feature 64: expected a whole number from 0 to 63"),
        ({-1: 1.0}, {}, "feature -1"),
        ({"3": 1.0}, {}, "feature '3'"),
        ({3: float("nan")}, {}, "coefficient nan"),
        ({3: torch.tensor(float("inf"))}, {}, "coefficient"),
        ({3: "2"}, {}, "coefficient '2'"),
        ({3: 1.0}, {"method": "clmp"}, "METHOD 'clmp': expected clamp, add, ablate or raw"),
        ({3: 1.0}, {"first_position": 0}, "first_position 0"),
    ],
)
def test_what_cannot_be_steered_is_said_in_one_line(lm, loaded, coefficients, options, words):
    with pytest.raises(SteeringError, match=words) as error, steer(lm, loaded, coefficients, **options):
        pass
    assert "\n" not in str(error.value)
    assert hooks_left(lm) == 0


@pytest.mark.parametrize(("method", "c"), [("raw", 1e19), ("clamp", -1e19)])
def test_an_edit_whose_norm_overflows_gives_no_text_of_nothing(lm, loaded, method, c):
    most_SD = 10 * torch.nn.functional.normalize(loaded.sae.W_dec[[5]], dim=1)  # which c alone is too small for
    with (
        pytest.raises(SteeringError, match=r"infinity in the logits with feature 5 steered.*lower COEFFICIENT"),
        steer(lm, loaded, {5: c}, method, directions_SD=most_SD),
    ):
        list(lm.generate([lm.tokenizer.bos_id, *range(20, 30)], 4))
    with steer(lm, loaded, {5: 1e6}, method):  # large, but there is room for it
        assert len(list(lm.generate([lm.tokenizer.bos_id, *range(20, 30)], 4))) > 0


def test_an_autoencoder_of_another_width_is_refused(lm):
    other = LoadedSAE(SparseAutoencoder(16, 32, 4), RESID_POST)
    with pytest.raises(SAEError, match=r"of width 16 and layer 1, and .* of width 32"), steer(lm, other, {3: 1}):
        pass


def test_a_layer_that_the_model_has_not_is_refused(lm):
    deep = loaded_of(autoencoder(), RESID_POST._replace(hook_name="blocks.9.hook_resid_post", hook_layer=9))
    with pytest.raises(SAEError, match=r"and layer 9, and .* layers 0 to 2"), steer(lm, deep, {3: 1.0}):
        pass


def test_a_layer_that_is_not_loaded_is_refused(mistral_folder, loaded):
    lm = load_model(mistral_folder, last_layer=0, device="cpu")
    with pytest.raises(ModelError, match="load more of it"), steer(lm, loaded, {3: 1.0}):
        pass


# ---- in the user's units ----


def subject_of(lm, loaded) -> Subject:
    return Subject(lm, loaded, Statistics(loaded.maximum_F.clone(), torch.full((F,), 0.001), None), {})


def test_multiples_of_the_maximum_become_activations(lm, loaded):
    subject = subject_of(lm, loaded)
    subject.statistics.maximum_F[:3] = torch.tensor([0.0, 2.0, 5.0])
    assert Edit({1: 1.5, 2: -1, 0: None}).in_units_of_steer(subject) == {1: 3.0, 2: -5.0, 0: None}
    with pytest.raises(SteeringError, match="feature 0, which never fired"):
        Edit({0: 1.0}).in_units_of_steer(subject)


@pytest.mark.parametrize(("method", "unit"), [("clamp", 3.0), ("add", 1.0), ("raw", 1.0), ("ablate", 1.0)])
def test_an_edit_is_steering_in_units_of_the_maximum_where_it_clamps(lm, loaded, tokens_BT, method, unit):
    with Edit({3: 0.5, 5: None}, method).context(subject_of(lm, loaded), 4):
        found = lm.forward(tokens_BT)
    with steer(lm, loaded, {3: 0.5 * unit, 5: None}, method):
        assert torch.equal(lm.forward(tokens_BT), found)


def test_an_edit_of_what_is_generated_leaves_the_prompt(lm, loaded, tokens_BT):
    with Edit({3: 9.0}, generated_only=True).context(subject_of(lm, loaded), 4):
        steered = lm.residuals(tokens_BT, LAYER)
    plain = lm.residuals(tokens_BT, LAYER)
    assert torch.equal(steered[:, :4], plain[:, :4])
    assert not torch.equal(steered[:, 4], plain[:, 4])


def test_an_edit_is_described_with_its_units(lm, loaded):
    subject = subject_of(lm, loaded)
    assert Edit({3: 0.5, 5: None}).describe(subject) == "clamp: 3 set to 0.5 times its maximum (1.5), 5 as it is"
    assert Edit({3: -2}, "add").describe(subject) == "add: 3 added at -2 times the residual's norm"
    assert Edit({3: 30}, "raw").describe(subject) == "raw: 3 added at 30 times its decoder row"
    assert Edit({3: 1}, "ablate", True).describe(subject) == "ablate: 3 set to 0; on generated tokens only"
    with pytest.raises(SteeringError, match="METHOD 'wrong'"):
        Edit({3: 1}, "wrong").describe(subject)


# ---- how often and how strongly features fire ----


class Rows:
    """A corpus of random rows of six tokens, known by its name, and the constants beside it."""

    context_length, ROWS_PER_FORWARD = 6, 4

    def __init__(self, run_dir, name):
        self.RUN_DIR, self.name, self.reads = run_dir, name, 0

    def __repr__(self):
        return self.name

    def rows(self, tokenizer, *, held_out):
        assert not held_out
        self.reads += 1
        generator = torch.Generator().manual_seed(0)
        ids = (torch.randint(20, 4096, (6,), generator=generator).numpy() for _ in range(100))
        return (Row(tokens, np.zeros(6, dtype=np.int32), ["a"]) for tokens in ids)


def test_what_training_measured_needs_no_text(lm, loaded):
    known = loaded._replace(density_F=torch.full((F,), 0.01))
    found = statistics_of(lm, known, None)
    torch.testing.assert_close(found.density_F, torch.full((F,), 0.01))
    assert torch.equal(found.maximum_F, loaded.maximum_F)


def test_statistics_are_measured_once_for_an_autoencoder_a_model_and_a_text(mistral_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(steering, "MAXIMUM_TOKENS", 60)
    monkeypatch.setattr(steering.Corpus, "of", lambda rows: rows)
    lm, other = load_model(mistral_folder, device="cpu"), load_model(mistral_folder, device="cpu")
    with torch.no_grad():
        for parameter in other.block(LAYER).parameters():
            parameter.mul_(1.01)
    loaded, fewer = (loaded_of(autoencoder())._replace(maximum_F=None) for _ in range(2))
    fewer.sae.k = 2

    def reads(model, sae, text) -> int:
        rows = Rows(tmp_path / "run", text)
        return statistics_of(model, sae, rows) and rows.reads

    assert reads(lm, loaded, "a") == 1
    assert reads(lm, loaded, "a") == 0
    for changed in ((lm, loaded, "b"), (other, loaded, "b"), (other, fewer, "b")):
        assert reads(*changed) == 1
        assert reads(*changed) == 0

    rows = islice(Rows(None, "b").rows(None, held_out=False), 10)
    rows_RT = torch.stack([torch.from_numpy(row.tokens) for row in rows])
    dense_NF = loaded.sae.encode(lm.residuals(rows_RT, LAYER)[:, 1:].flatten(0, 1)).dense(F)
    found = statistics_of(lm, loaded, Rows(tmp_path / "run", "b"))
    torch.testing.assert_close(found.maximum_F, dense_NF.amax(dim=0))
    torch.testing.assert_close(found.density_F, (dense_NF > 0).float().mean(dim=0))
    assert found.tokens == 10 * 5
