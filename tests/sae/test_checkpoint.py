import contextlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_sae.files import SAEError
from mistral_sae.sae import checkpoint
from mistral_sae.sae.autoencoder import SparseAutoencoder, normalize_rows
from mistral_sae.sae.checkpoint import Metadata, check_model, load_sae, save_sae
from mistral_sae.sae.features import Statistics

D, F, K = 32, 256, 8
METADATA = Metadata("mistral-7b", "blocks.16.hook_resid_post", 16, True, 512, "text/files", "0123456789abcdef")
V6 = {"sae_lens_version": "6.54.12", "model_name": "mistral-7b", "hook_name": "blocks.3.hook_resid_post"}


@pytest.fixture
def sae() -> SparseAutoencoder:
    torch.manual_seed(0)
    made = SparseAutoencoder(D, F, K)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        normalize_rows(made.W_dec)
    return made


def statistics(density: float | torch.Tensor = 0.5, maximum: float | torch.Tensor = 3.0) -> Statistics:
    return Statistics(torch.zeros(F) + maximum, torch.zeros(F) + density, None)


def residuals(scale: float = 1.0) -> torch.Tensor:
    """Tokens (2, 40, D) about a mean that is not zero."""
    generator = torch.Generator().manual_seed(1)
    return scale * (torch.randn(2, 40, D, generator=generator) + 0.5)


def tensors(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights as SAE Lens stores them, with decoder rows of many norms."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    W_dec = normal(F, D) * (0.05 + torch.rand(F, 1, generator=generator))
    W_enc = normal(D, F) / D**0.5
    return {"W_enc": W_enc, "b_enc": 0.1 * normal(F), "W_dec": W_dec, "b_dec": 0.2 * normal(D), **extra}


def write(folder: Path, weights: dict[str, torch.Tensor] | None = None, **cfg) -> Path:
    """A directory with what SAE Lens 6 writes for a TopK autoencoder, changed by `cfg`."""
    base = {"architecture": "topk", "k": K, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "metadata": V6}
    return write_folder(folder, base | cfg, weights or tensors())


def write_folder(folder: Path, cfg: dict, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("cfg.json").write_text(json.dumps(cfg))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def write_2024(folder: Path, weights: dict[str, torch.Tensor] | None = None, **cfg) -> Path:
    """A directory like the published one for layer 16 of Mistral 7B."""
    base = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": True,
        "context_size": 256,
        "d_in": D,
        "d_sae": F,
        "dataset_path": "some/dataset",
        "dtype": "torch.float32",
        "device": "cuda",
        "finetuning_scaling_factor": False,
        "hook_head_index": None,
        "hook_layer": 16,
        "hook_point": "blocks.16.hook_mlp_out",
        "model_name": "mistral-7b",
        "normalize_activations": "layer_norm",
        "prepend_bos": False,
    }
    return write_folder(folder, base | cfg, weights or tensors())


def assert_same(theirs, ours: SparseAutoencoder, x: torch.Tensor) -> None:
    """Features and reconstructions agree to 1e-5 of the largest, and there is something to agree on."""
    with torch.no_grad():
        features, reconstruction = theirs.encode(x), theirs(x)
        encoded = ours.encode(x)
        mine, restored = encoded.dense(ours.n_features), ours.decode(encoded)
    assert 0 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(mine, features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))
    torch.testing.assert_close(restored, reconstruction, rtol=1e-5, atol=1e-5 * float(reconstruction.abs().max()))


def assert_loads_alike(sae_lens, folder: Path, scale: float = 1.0) -> None:
    theirs = sae_lens.SAE.load_from_disk(folder, device="cpu")
    assert_same(theirs, load_sae(folder).sae, residuals(scale))


@contextlib.contextmanager
def refused(words: str):
    """An error of one line that holds some words and says what was expected."""
    with pytest.raises(SAEError, match=words) as error:
        yield error
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message


# What we save


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_sae_lens_gets_the_same_features_and_reconstructions_from_what_we_save(sae_lens, sae, tmp_path, scale):
    save_sae(tmp_path, sae, METADATA)
    assert_same(sae_lens.SAE.load_from_disk(tmp_path, device="cpu"), sae, residuals(scale))


def test_sae_lens_reads_our_metadata(sae_lens, sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    found = sae_lens.SAE.load_from_disk(tmp_path, device="cpu").cfg
    assert found.architecture() == "topk"
    assert (found.d_in, found.d_sae, found.k, found.normalize_activations) == (D, F, K, "layer_norm")
    assert found.metadata.model_name == METADATA.model_name
    assert found.metadata.hook_name == METADATA.hook_name
    assert found.metadata.prepend_bos is True
    assert found.metadata.context_size == METADATA.context_size
    assert found.metadata.dataset_path == METADATA.dataset_path
    assert found.metadata.sae_lens_training_version is None


def test_sae_lens_reads_our_sparsity_as_log10_firing_frequencies(sae_lens, sae, tmp_path, monkeypatch):
    frequency = torch.linspace(0, 1, F)
    save_sae(tmp_path, sae, METADATA, statistics(frequency))
    loaders = sae_lens.loading.pretrained_sae_loaders
    monkeypatch.setattr(loaders, "hf_hub_download", lambda filename, **_: str(tmp_path / Path(filename).name))
    found = loaders.sae_lens_huggingface_loader("owner/name", "sae")[2]
    assert found[0] == -10  # never fired: finite, as SAE Lens writes it
    torch.testing.assert_close(found, torch.log10(frequency + 1e-10))
    torch.testing.assert_close(load_sae(tmp_path).density_F, frequency)


def test_statistics_come_back_and_sae_lens_passes_over_the_maxima(sae_lens, sae, tmp_path):
    density, maximum = torch.linspace(0.1, 1, F), torch.linspace(0, 9, F)
    save_sae(tmp_path, sae, METADATA, statistics(density, maximum))
    found = load_sae(tmp_path).statistics
    assert torch.equal(found.maximum_F, maximum)
    torch.testing.assert_close(found.density_F, density)
    assert_same(sae_lens.SAE.load_from_disk(tmp_path, device="cpu"), sae, residuals())


def test_without_maxima_densities_are_loaded_alone(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    save_file({"sparsity": torch.full((F,), -2.0)}, tmp_path / "sparsity.safetensors")
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded.density_F, torch.full((F,), 0.01))
    assert loaded.maximum_F is loaded.statistics is None


def test_what_is_loaded_equals_what_was_saved(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    loaded = load_sae(str(tmp_path))
    assert loaded.metadata == METADATA
    assert loaded.density_F is None
    variant = (loaded.sae.k, loaded.sae.activation, loaded.sae.normalize, loaded.sae.center)
    assert variant == (K, "topk", "layer_norm", True)
    for name, parameter in sae.named_parameters():
        assert torch.equal(getattr(loaded.sae, name), parameter)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm", "none"])
def test_every_kind_we_can_load_we_can_save_for_sae_lens(sae_lens, tmp_path, activation, normalize):
    made = SparseAutoencoder(D, F, K, activation=activation, normalize=normalize, center=False)
    made.load_state_dict(tensors(), strict=False)
    if activation == "jumprelu":
        made.threshold.fill_(0.4)
    save_sae(tmp_path, made, METADATA)
    assert_same(sae_lens.SAE.load_from_disk(tmp_path, device="cpu"), made, residuals())
    assert_loads_alike(sae_lens, tmp_path)


def test_files_hold_float32_and_no_more_than_the_tensors(sae, tmp_path):
    save_sae(tmp_path, sae.to(torch.bfloat16), METADATA, statistics(torch.rand(4 * F)[:F]))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (tmp_path / "sae_weights.safetensors").stat().st_size < 4 * (2 * D * F + F + D) + 1024
    assert (tmp_path / "sparsity.safetensors").stat().st_size < 2 * 4 * F + 1024


def test_loaded_encoders_lie_in_memory_feature_by_feature(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    loaded = load_sae(tmp_path).sae
    assert loaded.W_enc.shape == (D, F)
    assert loaded.W_enc.T.is_contiguous()
    assert loaded.W_dec.is_contiguous()


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        sae.W_enc[3, 4] = torch.nan
    with refused("W_enc"):
        save_sae(tmp_path, sae, METADATA)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("crash_at", range(15))
@pytest.mark.parametrize("new_k", [K, K + 1])
def test_a_save_that_dies_never_leaves_a_mix_that_loads(sae, tmp_path, monkeypatch, crash_at, new_k):
    save_sae(tmp_path, sae, METADATA, statistics(0.25))
    changed = SparseAutoencoder(D, F, new_k)
    changed.load_state_dict(tensors())
    countdown = iter(range(crash_at))

    def dying(function):
        def call(*arguments, **options):
            if next(countdown, None) is None:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (checkpoint, "save_file")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    with contextlib.suppress(KeyboardInterrupt):
        save_sae(tmp_path, changed, METADATA, statistics(0.75))
        assert crash_at > 12  # as many steps as a save has, and there are no more to die at
    monkeypatch.undo()
    if not (tmp_path / "cfg.json").exists():
        with refused(r"found no .*cfg\.json"):
            load_sae(tmp_path)
        return
    loaded = load_sae(tmp_path)
    is_old = torch.equal(loaded.sae.W_dec, sae.W_dec)
    assert is_old or torch.equal(loaded.sae.W_dec, changed.W_dec)
    assert loaded.sae.k == (K if is_old else new_k)
    if loaded.density_F is not None:
        assert float(loaded.density_F[0]) == pytest.approx(0.25 if is_old else 0.75)
    save_sae(tmp_path, changed, METADATA)
    assert load_sae(tmp_path).sae.k == new_k


def test_saving_without_sparsity_removes_that_of_the_checkpoint_before(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA, statistics())
    save_sae(tmp_path, sae, METADATA)
    assert load_sae(tmp_path).density_F is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


# What we load


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_topk_means_the_same_to_us_as_to_sae_lens(sae_lens, tmp_path, normalize, center, rescale):
    config = sae_lens.TopKSAEConfig(
        d_in=D,
        d_sae=F,
        k=K,
        normalize_activations=normalize,
        apply_b_dec_to_input=center,
        rescale_acts_by_decoder_norm=rescale,
        metadata=sae_lens.saes.sae.SAEMetadata(model_name="m", hook_name="blocks.3.hook_resid_post"),
    )
    theirs = sae_lens.TopKSAE(config)
    theirs.load_state_dict(tensors())
    theirs.save_model(tmp_path)
    assert_loads_alike(sae_lens, tmp_path)
    metadata = load_sae(tmp_path).metadata
    assert metadata == Metadata("m", "blocks.3.hook_resid_post", 3, True, None, None)


def test_rescaling_by_the_decoder_norm_is_folded_into_unit_rows(tmp_path):
    loaded = load_sae(write(tmp_path, rescale_acts_by_decoder_norm=True)).sae
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(F))
    assert loaded.W_enc.T.is_contiguous()


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("center", [True, False])
def test_jumprelu_means_the_same_to_us_as_to_sae_lens(sae_lens, tmp_path, normalize, center):
    config = sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=F, normalize_activations=normalize, apply_b_dec_to_input=center)
    theirs = sae_lens.JumpReLUSAE(config)
    theirs.load_state_dict(tensors(threshold=torch.linspace(-0.5, 1.5, F)))  # SAE Lens lets thresholds be negative
    theirs.save_model(tmp_path)
    assert_loads_alike(sae_lens, tmp_path)
    assert load_sae(tmp_path).sae.threshold.min() == 0  # and none of its features is


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("center", [True, False])
def test_standard_means_the_same_to_us_as_to_sae_lens(sae_lens, tmp_path, normalize, center):
    config = sae_lens.StandardSAEConfig(d_in=D, d_sae=F, normalize_activations=normalize, apply_b_dec_to_input=center)
    theirs = sae_lens.StandardSAE(config)
    theirs.load_state_dict(tensors())
    theirs.save_model(tmp_path)
    assert_loads_alike(sae_lens, tmp_path)


@pytest.mark.parametrize("rescale", [True, False])
def test_one_scaling_factor_for_all_residuals_is_folded_as_sae_lens_folds_it(sae_lens, tmp_path, rescale):
    write(tmp_path, normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=rescale)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5}))
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    theirs.fold_activation_norm_scaling_factor(2.5)
    assert_same(theirs, load_sae(tmp_path).sae, residuals())


@pytest.mark.parametrize("normalize", ["expected_average_only_in", True])  # true in 2024
def test_a_missing_scaling_factor_is_an_error_rather_than_a_wrong_scale(tmp_path, normalize):
    with refused(r"activation_scaler\.json"):
        load_sae(write(tmp_path, normalize_activations=normalize))


@pytest.mark.parametrize(
    "cfg",
    [
        {},
        {"normalize_activations": "none"},
        {"normalize_activations": False},
        {"normalize_activations": None},
        {"apply_b_dec_to_input": False},
        {"activation_fn_str": "relu", "activation_fn_kwargs": {}},
    ],
    ids=str,
)
def test_directories_of_2024_mean_the_same_to_us_as_to_sae_lens(sae_lens, tmp_path, cfg):
    assert_loads_alike(sae_lens, write_2024(tmp_path, **cfg))


@pytest.mark.parametrize("missing", ["architecture", "apply_b_dec_to_input", "normalize_activations", "prepend_bos"])
def test_defaults_of_2024_are_those_of_sae_lens(sae_lens, tmp_path, missing):
    write_2024(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg[missing]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert_loads_alike(sae_lens, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path, device="cpu")
    assert load_sae(tmp_path).metadata.prepend_bos == theirs.cfg.metadata.prepend_bos


def test_scaling_factors_of_2024_are_accepted_where_they_are_all_one(sae_lens, tmp_path):
    assert_loads_alike(sae_lens, write_2024(tmp_path / "ones", tensors(scaling_factor=torch.ones(F))))
    with refused("scaling_factor"):
        load_sae(write_2024(tmp_path / "tuned", tensors(scaling_factor=torch.full((F,), 1.1))))


def test_directories_of_2024_keep_their_metadata_and_decoder_norms(tmp_path):
    loaded = load_sae(write_2024(tmp_path))
    assert loaded.metadata == Metadata("mistral-7b", "blocks.16.hook_mlp_out", 16, False, 256, "some/dataset")
    assert loaded.sae.k == K
    assert torch.equal(loaded.sae.W_dec, tensors()["W_dec"])


def test_a_wrong_hook_label_can_be_overridden(tmp_path):
    write_2024(tmp_path)
    found = load_sae(tmp_path, hook_name="blocks.15.hook_resid_post").metadata
    assert (found.hook_name, found.hook_layer) == ("blocks.15.hook_resid_post", 15)
    with refused("found an autoencoder of resid_post"):
        _ = load_sae(tmp_path, hook_name="resid_post").metadata.residual_layer


@pytest.mark.parametrize("digits", [20, 5000])
def test_a_hook_label_of_a_layer_that_no_model_has_is_not_passed_over(tmp_path, digits):
    loaded = load_sae(write_2024(tmp_path), hook_name=f"blocks.{'9' * digits}.hook_resid_post")
    with refused("expected the model that it was trained on"):
        check_model(loaded, "m", D, 32)


def test_the_layer_comes_from_the_hook_name_before_hook_layer(tmp_path):
    assert load_sae(write_2024(tmp_path, hook_layer=3)).metadata.hook_layer == 16
    assert load_sae(write_2024(tmp_path, hook_point="embedding", hook_layer=3)).metadata.hook_layer == 3
    assert load_sae(write_2024(tmp_path, hook_point=None, hook_layer=None, hook_point_layer=4)).metadata.hook_layer == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_type_is_loaded_as_float32(tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    loaded = load_sae(write(tmp_path, stored)).sae
    assert loaded.W_enc.dtype == torch.float32
    assert torch.equal(loaded.W_enc, stored["W_enc"].float())


# Where it is


def test_a_run_folder_stands_for_the_autoencoder_in_it(sae, tmp_path):
    save_sae(tmp_path / "sae", sae, METADATA)
    assert torch.equal(load_sae(tmp_path).sae.W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("source", "revision", "subfolder", "above"),
    [("owner/name", None, "", ""), ("owner/name/a/b", None, "a/b/", "a/"), ("owner/name/a@v1", "v1", "a/", "")],
)
def test_a_hub_repository_is_fetched_file_by_file(sae, tmp_path, monkeypatch, source, revision, subfolder, above):
    save_sae(tmp_path / subfolder, sae, METADATA, statistics())
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns, **_):
        asked.append((repo_id, revision, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load_sae(source)
    names = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "activation_scaler.json")
    others = ("sae.safetensors", "ae.safetensors", "config.json")  # of other libraries
    wanted = {above + "config.json", *(subfolder + name for name in (*names, *others))}
    assert asked == [("owner/name", revision, wanted)]
    assert torch.equal(loaded.sae.W_dec, sae.W_dec)
    assert loaded.density_F is not None


def test_what_published_folders_leave_out_is_known_by_their_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    relu = {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "hook_point": "blocks.8.hook_resid_pre"}
    write_2024(tmp_path / "mistral_7b_layer_8", **relu | {"normalize_activations": None})
    loaded = load_sae("JoshEngels/Mistral-7B-Residual-Stream-SAEs/mistral_7b_layer_8")
    assert loaded.sae.normalize == "constant_norm"
    assert loaded.metadata.residual_layer == 7
    assert loaded.metadata.model_name == "mistralai/Mistral-7B-v0.1"

    write_2024(tmp_path)
    mislabelled = "tylercosgrove/mistral-7b-sparse-autoencoder-layer16"
    metadata = load_sae(mislabelled).metadata
    assert (metadata.residual_layer, metadata.model_name) == (16, "mistralai/Mistral-7B-Instruct-v0.1")
    assert load_sae(mislabelled, hook_name="blocks.3.hook_resid_post").metadata.residual_layer == 3
    assert load_sae("owner/name").metadata.hook_name == "blocks.16.hook_mlp_out"


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with refused("owner/name") as error:
        load_sae("owner/name")
    assert "no network" in str(error.value)


def test_a_misspelt_local_path_is_not_looked_for_on_the_hub(sae, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    save_sae(Path("runs/first/sae"), sae, METADATA)
    wrong = ("runs/frist", "./owner/name", "/no/such", "../owner/name", "nothing", "runs/first/sae/cfg.json")
    for source in (*wrong, Path("owner/name")):
        with refused("found no folder"):
            load_sae(source)


# What is wrong with it


def test_missing_files_are_named(tmp_path):
    with refused(r"found no .*cfg\.json"):
        load_sae(tmp_path)
    write(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with refused(r"sae_weights\.safetensors"):
        load_sae(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    write(tmp_path)
    torch.save(Trap(), tmp_path / "sae_weights.safetensors")
    with refused("damaged"):
        load_sae(tmp_path)


@pytest.mark.parametrize("key", ["d_in", "d_sae", "k", "architecture"])
def test_a_missing_key_is_named(tmp_path, key):
    write(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg[key]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with refused(f"found no {key} "):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        ({"d_in": "32"}, "d_in"),
        ({"d_sae": True}, "d_sae"),
        ({"k": 8.5}, "k = 8.5"),
        ({"k": 0}, "k = 0"),
        ({"k": F + 1}, f"k = {F + 1}"),
        ({"metadata": 3}, "metadata"),
        ({"metadata": {**V6, "model_name": 3}}, "model_name"),
        ({"metadata": {**V6, "prepend_bos": "yes"}}, "prepend_bos"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input"),
        ({"activation_fn_kwargs": 3}, "activation_fn_kwargs"),
        ({"architecture": "temporal"}, "temporal"),
        ({"architecture": ["topk"]}, "architecture"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": ["none"]}, "normalize_activations"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_named(tmp_path, cfg, named):
    with refused(named):
        load_sae(write(tmp_path, **cfg))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_weights_that_cannot_be_used_are_named(tmp_path, name):
    good = tensors()
    missing = {other: tensor for other, tensor in good.items() if other != name}
    short = {**good, name: good[name][:-1].clone()}
    integers = {**good, name: good[name].to(torch.int32)}
    spoilt = {**good, name: good[name].clone()}
    spoilt[name].view(-1)[3] = torch.nan
    infinite = {**good, name: torch.full_like(good[name], torch.inf)}
    for number, bad in enumerate((missing, short, integers, spoilt, infinite)):
        with refused(f"{name} "):
            load_sae(write(tmp_path / str(number), bad))


def test_transposed_weights_and_unknown_tensors_are_refused(tmp_path):
    good = tensors()
    with refused("W_enc of shape"):
        load_sae(write(tmp_path / "a", {**good, "W_enc": good["W_dec"].clone()}))
    with refused("r_mag"):
        load_sae(write(tmp_path / "b", tensors(r_mag=torch.ones(F))))


def test_impossible_sizes_are_refused_before_memory_is_taken(tmp_path):
    with refused("W_enc of shape"):
        load_sae(write(tmp_path / "large", d_sae=10**9))
    with refused("found d_sae = 1000000000000000 in .* less than 2147483648"):
        load_sae(write(tmp_path / "larger", d_sae=10**15))


def test_sparsity_of_another_autoencoder_is_refused(sae, tmp_path):
    save_sae(tmp_path, sae, METADATA)
    maximum_of_another = {"sparsity": torch.zeros(F), "maximum": torch.zeros(F - 1)}
    for contents in ({"sparsity": torch.zeros(F - 1)}, {"density": torch.zeros(F)}, maximum_of_another):
        save_file(contents, tmp_path / "sparsity.safetensors")
        with refused("sparsity"):
            load_sae(tmp_path)


# Where it was trained


@pytest.mark.parametrize(
    ("hook_name", "layer", "expected"),
    [("blocks.16.hook_resid_post", 16, 16), ("blocks.8.hook_resid_pre", 8, 7)],
)
def test_the_hook_says_after_which_layer_the_residual_is(hook_name, layer, expected):
    assert METADATA._replace(hook_name=hook_name, hook_layer=layer).residual_layer == expected


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [("blocks.16.hook_mlp_out", 16), ("blocks.0.hook_resid_pre", 0), (None, None), ("hook_embed", None)],
)
def test_an_autoencoder_of_another_place_is_refused(hook_name, layer):
    with refused("residual stream"):
        _ = METADATA._replace(hook_name=hook_name, hook_layer=layer).residual_layer
