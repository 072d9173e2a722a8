"""Autoencoders that other libraries saved: ours gives the features and reconstructions that theirs does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import D, F, K, assert_same, refused, residuals, tensors, write

from mistral_sae.sae.checkpoint import Metadata, load_sae

CUTOFF = 0.6
THRESHOLD = torch.linspace(-0.2, 1.2, F)


def write_sparsify(folder: Path, **cfg) -> Path:
    """A folder of sparsify for one hookpoint, with weights of `tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("cfg.json").write_text(
        json.dumps({"d_in": D, "k": K, "num_latents": F, "activation": "topk"} | cfg)
    )
    ours = tensors()
    weights = {"encoder.weight": ours["W_enc"].T.contiguous(), "encoder.bias": ours["b_enc"]}
    save_file(weights | {name: ours[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    return folder


def dictionary_weights(kind: str) -> dict[str, torch.Tensor]:
    """The state of each class of dictionary_learning, with weights of `tensors`."""
    ours, scalars = tensors(), {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(CUTOFF)}
    if kind == "JumpReluAutoEncoder":
        return ours | {"threshold": THRESHOLD}
    if kind == "MatryoshkaBatchTopKSAE":
        return ours | scalars | {"group_sizes": torch.tensor([F // 2, F // 2])}
    linear = {"encoder.weight": ours["W_enc"].T, "encoder.bias": ours["b_enc"], "decoder.weight": ours["W_dec"].T}
    if kind == "GatedAutoEncoder":
        del linear["encoder.bias"]
        return linear | {
            "decoder_bias": ours["b_dec"],
            "r_mag": 0.5 * ours["b_enc"].flip(0),
            "gate_bias": -0.4 + ours["b_enc"],
            "mag_bias": 0.3 * ours["b_enc"].roll(1),
        }
    names = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}
    return linear | {names.get(kind, "b_dec"): ours["b_dec"]} | ({} if kind in names else scalars)


def write_dictionary(folder: Path, kind: str, **trainer) -> Path:
    """A folder of dictionary_learning, but for its weights as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    of = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 3, "lm_name": "owner/model"}
    buffer = {"ctx_len": 128, "io": "out", "d_submodule": D}
    folder.joinpath("config.json").write_text(json.dumps({"trainer": of | trainer, "buffer": buffer}))
    weights = {name: tensor.contiguous() for name, tensor in dictionary_weights(kind).items()}
    save_file(weights, folder / "ae.safetensors")
    return folder


# What the features are, in each library's terms


def topk(pre):
    values, indices = pre.relu().topk(K)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def dictionary_features(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction as the source of dictionary_learning computes them."""
    t = tensors()
    norm = t["W_dec"].norm(dim=1)
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        pre = x @ t["W_enc"] + t["b_enc"]
    else:
        pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = pre.relu()
    if kind == "AutoEncoderTopK":
        f = topk(pre)
    elif "BatchTopK" in kind:
        f = f * (f > CUTOFF)
    elif kind == "JumpReluAutoEncoder":
        f = (pre * (pre > THRESHOLD)).relu()
    elif kind == "GatedAutoEncoder":
        w = dictionary_weights(kind)
        shared = (x - t["b_dec"]) @ t["W_enc"]
        f = (shared + w["gate_bias"] > 0) * (w["r_mag"].exp() * shared + w["mag_bias"]).relu()
    return f * norm if kind == "AutoEncoder" else f, f @ t["W_dec"] + t["b_dec"]


class Theirs:
    """Features and reconstructions, called as SAE Lens's are."""

    def __init__(self, features_and_reconstruction):
        self.both = features_and_reconstruction

    def encode(self, x):
        return self.both(x)[0]

    def __call__(self, x):
        return self.both(x)[1]


CLASSES = [
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
    "GatedAutoEncoder",
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_means_the_same_to_us(tmp_path, kind):
    loaded = load_sae(write_dictionary(tmp_path, kind))
    assert_same(Theirs(lambda x: dictionary_features(kind, x)), loaded.sae, residuals())
    assert loaded.metadata == Metadata("owner/model", "blocks.3.hook_resid_post", 3, True, 128, None)


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning_itself_gives_these_features(tmp_path, kind):
    dictionary = pytest.importorskip("dictionary_learning.utils")
    folder = write_dictionary(tmp_path, kind)
    torch.save(dictionary_weights(kind), folder / "ae.pt")
    theirs, _ = dictionary.load_dictionary(str(folder), "cpu")
    x = residuals().flatten(0, 1)  # BatchTopK knows no rows
    assert_same(Theirs(lambda x: (theirs.encode(x), theirs(x))), load_sae(folder).sae, x)


def test_sparsify_means_the_same_to_us(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "owner/model", "dataset": "text", "ctx_len": 64}))
    loaded = load_sae(write_sparsify(tmp_path / "layers.3"))
    t = tensors()

    def theirs(x):
        f = topk((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        return f, f @ t["W_dec"] + t["b_dec"]

    assert_same(Theirs(theirs), loaded.sae, residuals())
    assert loaded.metadata == Metadata("owner/model", "layers.3", 3, True, 64, "text")
    assert loaded.metadata.residual_layer == 3


def test_sparsify_itself_gives_these_features(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # which wants a GPU
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(write_sparsify(tmp_path / "layers.3"))

    def both(x):
        out = theirs(x.flatten(0, 1))
        f = torch.zeros(len(out.latent_acts), F).scatter(-1, out.latent_indices, out.latent_acts)
        return f.view(*x.shape[:-1], F), out.sae_out.view(x.shape)

    assert_same(Theirs(both), load_sae(tmp_path / "layers.3").sae, residuals())


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_gated_means_the_same_to_us_as_to_sae_lens(sae_lens, tmp_path, normalize):
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D, d_sae=F, normalize_activations=normalize))
    t, w = tensors(), dictionary_weights("GatedAutoEncoder")
    own = {"b_gate": w["gate_bias"], "b_mag": w["mag_bias"], "r_mag": w["r_mag"]}
    theirs.load_state_dict({name: t[name] for name in ("W_enc", "W_dec", "b_dec")} | own)
    theirs.save_model(tmp_path)
    assert_same(theirs, load_sae(tmp_path).sae, residuals())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
@pytest.mark.parametrize("factor", [None, 2.5])
def test_unfinished_batchtopk_is_what_sae_lens_would_save_of_it(sae_lens, tmp_path, kind, rescale, factor):
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")
    options = {"matryoshka_widths": [F // 2, F]} if kind.startswith("M") else {}
    normalize = "expected_average_only_in" if factor else "none"
    options |= {"normalize_activations": normalize, "rescale_acts_by_decoder_norm": rescale}
    training = getattr(sae_lens, f"{kind}TrainingSAE")(config(d_in=D, d_sae=F, k=2.5, **options))
    training.load_state_dict(tensors(topk_threshold=torch.tensor(CUTOFF, dtype=torch.double)))
    training.save_model(tmp_path / "unfinished")
    (tmp_path / "unfinished/activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    if factor:
        training.fold_activation_norm_scaling_factor(factor)
        training.cfg.normalize_activations = "none"
    training.save_inference_model(tmp_path / "finished")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "finished", device="cpu")
    for folder in ("unfinished", "finished"):
        assert_same(theirs, load_sae(tmp_path / folder).sae, residuals())


def test_a_hookpoint_on_the_hub_is_named_by_its_folder(hub, tmp_path):
    for layer in (3, 10):
        write_sparsify(tmp_path / f"layers.{layer}")
    (tmp_path / "config.json").write_text(json.dumps({"model": "owner/base"}))
    with hub(tmp_path) as asked:
        with refused("found 2 autoencoders below owner/model, .*SAE_PATH=owner/model/layers.3, or so with layers.10"):
            load_sae("owner/model")
        assert load_sae("owner/model/layers.3").metadata == Metadata("owner/base", "layers.3", 3, True, None, None)
        assert "layers.10/sae.safetensors+" not in asked


# Where it belongs


@pytest.mark.parametrize("name", ["model.layers.16", "layers.16", "blocks.16.hook_resid_post"])
def test_a_layer_may_be_named_as_in_transformers(tmp_path, name):
    assert load_sae(write(tmp_path), hook_name=name).metadata.residual_layer == 16


@pytest.mark.parametrize("name", ["layers.16.mlp", "model.layers.16.self_attn", "model.layers", "sae"])
def test_what_is_not_a_layers_output_is_refused(tmp_path, name):
    with refused("residual stream"):
        _ = load_sae(write(tmp_path), hook_name=name).metadata.residual_layer


@pytest.mark.parametrize(
    ("submodule", "io", "expected"),
    [("resid_post_layer_3", "out", 3), (None, "in", 2), (None, "out", 3), ("mlp_out_layer_3", "out", None)],
)
def test_dictionary_learning_says_where_it_was_trained(tmp_path, submodule, io, expected):
    folder = write_dictionary(tmp_path, "AutoEncoder", submodule_name=submodule)
    cfg = json.loads((folder / "config.json").read_text())
    cfg["buffer"]["io"] = io
    (folder / "config.json").write_text(json.dumps(cfg))
    metadata = load_sae(folder).metadata
    if expected is None:
        with refused("mlp_out_layer_3"):
            _ = metadata.residual_layer
    else:
        assert metadata.residual_layer == expected


# What is not read


def test_a_pickle_is_refused_with_what_to_do(tmp_path):
    folder = write_dictionary(tmp_path, "AutoEncoder")
    (folder / "ae.pt").write_bytes(b"not opened")
    load_sae(folder)
    (folder / "ae.safetensors").unlink()
    with refused(r"found ae\.pt in .*a pickle.*ae\.safetensors"):
        load_sae(folder)


def test_gemma_scope_is_refused_with_a_reason(tmp_path):
    (tmp_path / "params.npz").write_bytes(b"")
    with refused("Gemma is not run here"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"activation": "groupmax"}, "activation = 'groupmax'"),
        ({"transcode": True}, "transcode = True"),
        ({"skip_connection": True}, "skip_connection = True"),
        ({"signed": True}, "signed = True"),
        ({"num_latents": 0, "expansion_factor": 4}, "encoder.weight of shape"),
        ({"k": 0}, "k = 0"),
    ],
)
def test_what_sparsify_has_and_we_have_not_is_named(tmp_path, cfg, words):
    with refused(words):
        load_sae(write_sparsify(tmp_path / "layers.3", **cfg))


@pytest.mark.parametrize(
    ("trainer", "words"),
    [({"dict_class": "CrossCoder"}, "CrossCoder"), ({"k": F + 1}, f"k = {F + 1}"), ({"dict_size": "x"}, "dict_size")],
)
def test_what_dictionary_learning_has_and_we_have_not_is_named(tmp_path, trainer, words):
    with refused(words):
        load_sae(write_dictionary(tmp_path, "AutoEncoderTopK", **trainer))


def test_a_folder_with_several_below_lists_them_by_number(tmp_path):
    for layer in (10, 2, 3):
        write_sparsify(tmp_path / f"layers.{layer}")
    (tmp_path / "config.json").write_text("{}")  # sparsify's, of the run
    write(tmp_path / "lens/blocks.1.hook_resid_post")
    with refused(f"found 4 autoencoders below .*SAE_PATH={tmp_path}/layers.2, or so with layers.3, layers.10, lens"):
        load_sae(tmp_path)
