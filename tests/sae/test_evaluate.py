"""What an autoencoder keeps, against figures that are known or computed the long way."""

import pytest
import torch
import torch.nn.functional as F

from mistral_sae.model.language_model import load_model
from mistral_sae.sae import evaluate
from mistral_sae.sae.autoencoder import SparseAutoencoder, normalize_rows
from mistral_sae.sae.evaluate import Evaluator, reconstruction

D, N_FEATURES, K = 32, 96, 6
LAYER = 1


@pytest.fixture(scope="module")
def model(mistral_folder):
    return load_model(mistral_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rows_RT():
    return torch.randint(20, 4096, (7, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def x(model, rows_RT):
    return model.residuals(rows_RT, LAYER)[:, 1:].flatten(0, 1)


@torch.no_grad()
def random_sae(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(D, N_FEATURES, K)
    for parameter in sae.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    normalize_rows(sae.W_dec)
    return sae


@torch.no_grad()
def perfect_sae():
    """Each coordinate and its opposite is a feature: relu(z) - relu(-z) = z."""
    sae = SparseAutoencoder(D, 2 * D, 2 * D)
    sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    sae.W_enc.copy_(sae.W_dec.T)
    return sae


@torch.no_grad()
def constant_sae(value_D, normalize):
    """No feature ever fires."""
    sae = SparseAutoencoder(D, 8, 2, normalize=normalize)
    sae.W_enc.zero_()
    sae.W_dec.zero_()
    sae.b_enc.fill_(-1.0)
    sae.b_dec.copy_(value_D)
    return sae


# ---- reconstruction ----


def test_a_perfect_autoencoder_explains_everything(x):
    found = reconstruction(perfect_sae(), [x])
    assert found.normalized_mse == pytest.approx(0, abs=1e-8)
    assert found.explained_variance == pytest.approx(1, abs=1e-8)
    assert found.l0 == pytest.approx(D)  # one of each pair
    assert found.tokens == len(x)


def test_predicting_the_mean_explains_nothing(x):
    found = reconstruction(constant_sae(x.mean(dim=0), "none"), [x])
    assert found.normalized_mse == pytest.approx(1, abs=1e-6)
    assert found.explained_variance == pytest.approx(0, abs=1e-6)
    assert (found.l0, found.silent_fraction) == (0, 1)


def test_predicting_the_mean_of_standardised_residuals_has_a_normalized_mse_of_1(x):
    z, _, _ = random_sae().standardize(x)
    assert reconstruction(constant_sae(z.mean(dim=0), "layer_norm"), [x]).normalized_mse == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_the_figures_are_those_of_a_dense_computation(x):
    sae = random_sae()
    found = reconstruction(sae, x.split(10))

    mean, std = x.double().mean(dim=1, keepdim=True), x.double().std(dim=1, keepdim=True)
    z = (x.double() - mean) / (std + 1e-5)
    pre = (z - sae.b_dec) @ sae.W_enc.double() + sae.b_enc
    f = torch.where(pre >= pre.topk(K).values[:, -1:], pre, 0.0).relu()
    z_hat = f @ sae.W_dec.double() + sae.b_dec
    x_hat = z_hat * std + mean
    assert found.normalized_mse == pytest.approx(
        float(((z - z_hat) ** 2).sum() / ((z - z.mean(0)) ** 2).sum()), rel=1e-4
    )
    unexplained = float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert found.explained_variance == pytest.approx(1 - unexplained, rel=1e-4)
    assert found.l0 == pytest.approx(float((f > 0).sum(dim=1).double().mean()))
    torch.testing.assert_close(found.density_F.double(), (f > 0).double().mean(dim=0), rtol=1e-5, atol=1e-7)
    assert found.silent_fraction == pytest.approx(float((~(f > 0).any(dim=0)).double().mean()))


def test_an_offset_that_all_residuals_share_counts_for_nothing(x):
    """Variance is about the mean; about 0 a large offset would make any reconstruction look perfect."""
    offset = constant_sae(x.mean(dim=0) + 1000, "none")
    assert reconstruction(offset, [x + 1000]).explained_variance == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_no_figure_depends_on_how_the_residuals_are_cut_into_batches(x, size):
    # Batches that differ, so that a mean over batches would show
    x = torch.cat([x, 5 * x[:20] + 3])
    whole, cut = reconstruction(random_sae(), [x]), reconstruction(random_sae(), x.split(size))
    for name in ("tokens", "l0", "normalized_mse", "explained_variance", "silent_fraction", "rare_fraction"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-5), name
    torch.testing.assert_close(cut.density_F, whole.density_F)


def test_density_silent_and_rare_count_the_tokens_on_which_a_feature_fired(monkeypatch):
    """Four features read one coordinate each; the first fires on all of 20 tokens, the last on none."""
    monkeypatch.setattr(evaluate, "RARE", 0.1)
    sae = SparseAutoencoder(4, 4, 4, normalize="none")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    x = -torch.ones(20, 4)
    x[:, 0], x[:10, 1], x[0, 2] = 1, 1, 1

    found = reconstruction(sae, x.split(8))

    assert found.density_F.tolist() == pytest.approx([1, 0.5, 0.05, 0])
    assert found.silent_fraction == 0.25
    assert found.rare_fraction == 0.5
    assert found.l0 == pytest.approx(31 / 20)


def test_no_residuals_are_an_error():
    with pytest.raises(ValueError, match="no held-out residuals"):
        reconstruction(random_sae(), [])


# ---- cross-entropy ----


def cross_entropy(model, sae, rows_RT, rows_per_forward=3):
    return Evaluator(model, rows_RT, LAYER, rows_per_forward).cross_entropy(sae)


def test_through_a_perfect_autoencoder_the_model_predicts_as_before(model, rows_RT):
    found = cross_entropy(model, perfect_sae(), rows_RT)
    assert found["ce_loss_with_sae"] == pytest.approx(found["ce_loss_clean"], abs=1e-4)
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(found["ce_loss_ablated"] - found["ce_loss_clean"]) > 0.01  # or what follows would mean nothing
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-2)
    assert found["ce_loss_recovered_zero"] == pytest.approx(1, abs=1e-2)


def test_predicting_the_mean_recovers_nothing(model, rows_RT, x):
    found = cross_entropy(model, constant_sae(x.mean(dim=0), "none"), rows_RT)
    assert found["ce_loss_with_sae"] == pytest.approx(found["ce_loss_ablated"], abs=1e-5)
    assert found["ce_loss_recovered"] == pytest.approx(0, abs=1e-3)
    assert found["kl"] > 0.01


def test_a_bos_between_documents_is_neither_measured_nor_replaced(model, rows_RT, x):
    rows_RT = rows_RT.clone()
    rows_RT[2, 5] = model.tokenizer.bos_id
    evaluator = Evaluator(model, rows_RT, LAYER, 3)
    residuals = model.residuals(rows_RT, LAYER)
    is_kept = model.kept(rows_RT)
    assert is_kept.sum() == 7 * 8 - 1
    assert evaluator(random_sae())["tokens"] == 7 * 8 - 1
    mean = residuals[is_kept].mean(dim=0)
    logprobs = logprobs_of(model, rows_RT, torch.where(is_kept[..., None], mean, residuals))
    loss = F.nll_loss(logprobs.flatten(0, 1), rows_RT[:, 1:].flatten()).item()
    assert evaluator.cross_entropy(random_sae())["ce_loss_ablated"] == pytest.approx(loss, rel=1e-5)


def logprobs_of(model, rows_RT, residual_RTD):
    """The rest of the model on residuals of LAYER, without the hooks of this project."""
    handle = model.block(LAYER).register_forward_hook(lambda module, args, output: residual_RTD.view(output.shape))
    try:
        return model.forward(rows_RT)[:, :-1].double().log_softmax(dim=-1)
    finally:
        handle.remove()


@torch.no_grad()
def test_cross_entropies_equal_a_direct_computation_that_keeps_the_first_position(model, rows_RT, x):
    sae, clean_RTD = random_sae(), model.residuals(rows_RT, LAYER)
    found = cross_entropy(model, sae, rows_RT)

    def loss_of(replacement, first=1):
        edited = torch.cat([clean_RTD[:, :first], replacement.expand_as(clean_RTD)[:, first:]], dim=1)
        logprobs = logprobs_of(model, rows_RT, edited)
        return F.nll_loss(logprobs.flatten(0, 1), rows_RT[:, 1:].flatten()).item(), logprobs

    clean, clean_logprobs = loss_of(clean_RTD)
    with_sae, logprobs = loss_of(sae(clean_RTD))
    ablated, _ = loss_of(x.mean(dim=0))
    zero, _ = loss_of(torch.zeros(()))
    kl = (clean_logprobs.exp() * (clean_logprobs - logprobs)).sum(dim=-1).mean().item()

    close = {"abs": 2e-5}
    assert found["ce_loss_clean"] == pytest.approx(clean, **close)
    assert found["ce_loss_with_sae"] == pytest.approx(with_sae, **close)
    assert found["ce_loss_ablated"] == pytest.approx(ablated, **close)
    assert found["ce_loss_zero_ablated"] == pytest.approx(zero, **close)
    assert found["kl"] == pytest.approx(kl, **close)
    assert found["ce_loss_recovered"] == pytest.approx((ablated - with_sae) / (ablated - clean), rel=1e-3)
    assert found["ce_loss_recovered_zero"] == pytest.approx((zero - with_sae) / (zero - clean), rel=1e-3)
    # All of them would be others with the first position replaced too
    for replacement, value in ((sae(clean_RTD), with_sae), (x.mean(dim=0), ablated), (torch.zeros(()), zero)):
        assert abs(loss_of(replacement, first=0)[0] - value) > 1e-3


def test_the_figures_do_not_depend_on_the_rows_at_a_time(model, rows_RT):
    one, all_of_them = (cross_entropy(model, random_sae(), rows_RT, rows) for rows in (1, 100))
    assert one == pytest.approx(all_of_them, abs=1e-4)


def test_no_more_logits_exist_at_a_time_than_fit_the_bound(model, rows_RT, monkeypatch):
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens: (sizes.append(len(tokens)), forward(tokens))[1])
    cross_entropy(model, random_sae(), rows_RT, 4)
    assert max(sizes) == 4
    sizes.clear()
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 4 * 2 * rows_RT.shape[1] * model.vocab_size)
    cross_entropy(model, random_sae(), rows_RT, 4)
    assert max(sizes) == 2


def test_the_model_is_as_it_was_after_the_evaluation(model, rows_RT):
    before = model.forward(rows_RT)
    cross_entropy(model, random_sae(), rows_RT)
    assert torch.equal(model.forward(rows_RT), before)


def test_what_the_layer_is_worth_is_measured_once(model, rows_RT, monkeypatch):
    replaced, log_probabilities = [], model.log_probabilities

    def counted(tokens, *layer_and_replace):
        replaced.extend([layer_and_replace] if layer_and_replace else [])
        return log_probabilities(tokens, *layer_and_replace)

    monkeypatch.setattr(model, "log_probabilities", counted)
    evaluate_sae = Evaluator(model, rows_RT, LAYER, 7)
    first = evaluate_sae(random_sae())
    assert len(replaced) == 4  # as it is, through the autoencoder, its mean, zero
    assert evaluate_sae(random_sae()) == first
    assert len(replaced) == 6


def test_part_of_a_model_gives_the_figures_of_reconstruction_alone(mistral_folder, rows_RT):
    part = load_model(mistral_folder, last_layer=LAYER, dtype="float32", device="cpu")
    figures = Evaluator(part, rows_RT, LAYER, 3)(random_sae())
    assert "normalized_mse" in figures
    assert not any(name.startswith("ce_") for name in figures)
