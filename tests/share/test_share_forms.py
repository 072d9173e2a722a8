"""What other tools are given is what they read, and says what we know."""

import json

import gguf
import pytest
import torch
from report_records import EXPLANATIONS, example

from mistral_sae.cli import UserError
from mistral_sae.explain.types import BINS, Feature, Label, Score
from mistral_sae.sae.autoencoder import SparseAutoencoder, normalize_rows
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata, load_sae
from mistral_sae.sae.features import Statistics
from mistral_sae.share import forms
from mistral_sae.steer.steering import Edit, Subject

D, F, K = 32, 128, 6
METADATA = Metadata("owner/model", "blocks.1.hook_resid_post", 1, True, 64, "owner/text")


def made(layer: int = 1, **options) -> LoadedSAE:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, K, **options).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    normalize_rows(sae.W_dec)
    return LoadedSAE(sae, METADATA._replace(hook_name=f"blocks.{layer}.hook_resid_post", hook_layer=layer))


# sparsify


@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
@pytest.mark.parametrize("center", [True, False])
def test_what_is_written_for_sparsify_is_the_same_autoencoder_when_it_is_read(tmp_path, normalize, center):
    loaded, x = made(normalize=normalize, center=center), torch.randn(50, D)
    folder = forms.write_sparsify(tmp_path, loaded)
    again = load_sae(folder)
    assert again.metadata == METADATA._replace(hook_name="layers.1")
    torch.testing.assert_close(again.sae.encode(x).dense(F), loaded.sae.encode(x).dense(F))
    torch.testing.assert_close(again.sae(x), loaded.sae(x))


def test_sparsify_itself_gives_our_features_of_standardised_residuals(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # which wants a GPU
    sparsify = pytest.importorskip("sparsify")
    loaded, x = made(), torch.randn(50, D)
    theirs = sparsify.SparseCoder.load_from_disk(forms.write_sparsify(tmp_path, loaded))
    z, _, _ = loaded.sae.standardize(x)
    out = theirs(z)
    f = torch.zeros(50, F).scatter(-1, out.latent_indices, out.latent_acts)
    torch.testing.assert_close(f, loaded.sae.encode(x).dense(F))
    torch.testing.assert_close(out.sae_out * x.std(1, keepdim=True) + x.mean(1, keepdim=True), loaded.sae(x))


def test_sparsify_has_topk_only(tmp_path):
    with pytest.raises(UserError, match="found an autoencoder with relu: expected topk"):
        forms.write_sparsify(tmp_path, made(activation="relu"))


# SAE Dashboard and Neuronpedia


def feature(number: int, rng) -> Feature:
    histogram = tuple(rng.randrange(1, 9) for _ in range(BINS))
    strengths = [4.0, 3.1, 2.0, 0.9, 0.1]
    passages = tuple(example(rng, " raise", strength, i) for i, strength in enumerate(strengths))
    promoted, suppressed = ((" the", 1.23456), ("\n", 1.0)), ((" of", -2.0),)
    return Feature(number, 0.01, 4.0, histogram, promoted, suppressed, top=passages[:2], spread=passages)


@pytest.fixture
def written(tmp_path):
    """The files of some features, of which the first is explained, as JSON."""
    import random

    rng = random.Random(0)
    features = [feature(number, rng) for number in range(forms.BATCH + 1)]
    labels = {0: Label(0, EXPLANATIONS[0], "a-model", "ok", {"detection": Score(0.75), "fuzzing": Score(None)})}
    labels[1] = Label(1, "", "a-model", "unparsed", {})
    paths = forms.write_dashboards(
        tmp_path, iter(features), labels, METADATA, n_features=16384, corpus=("owner/text", 10, 64)
    )
    *batches, explanations = [path.read_text() for path in paths]
    return features, list(map(json.loads, batches)), list(map(json.loads, explanations.splitlines()))


def test_features_are_written_in_batches(written):
    features, batches, _ = written
    assert [len(batch["features"]) for batch in batches] == [forms.BATCH, 1]
    assert {(b["model_id"], b["layer"], b["sae_set"]) for b in batches} == {("owner/model", 1, "res-16k")}
    numbers = [record["feature_index"] for batch in batches for record in batch["features"]]
    assert numbers == [each.feature for each in features]


def test_of_an_earlier_export_only_the_files_that_follow_are_removed_and_only_in_the_end(tmp_path, written):
    (tmp_path / "to").mkdir()
    others = {tmp_path / "to" / f"batch-{name}.json" for name in (1, 12, "mine")}
    for path in others:
        path.write_text("{}")

    def features(last):
        yield written[0][0]
        assert all(path.exists() for path in others)
        yield last

    rest: dict = {"labels": {}, "metadata": METADATA, "n_features": 16384, "corpus": ("owner/text", 10, 64)}
    with pytest.raises(AttributeError):
        forms.write_dashboards(tmp_path / "to", features(None), **rest)
    assert all(path.exists() for path in others)
    forms.write_dashboards(tmp_path / "to", features(written[0][1]), **rest)
    names = {path.name for path in (tmp_path / "to").glob("batch-*")}
    assert names == {"batch-0.json", "batch-mine.json"}


def test_each_passage_lies_in_the_part_of_the_range_that_it_is_said_to_be_from(written):
    features, (batch, _), _ = written
    record, parts = batch["features"][0], {}
    top, spread = record["activations"][:2], record["activations"][2:]
    assert [each["bin_min"] for each in top] == [-1, -1]
    for each in spread:
        strength = max(each["values"])
        assert each["bin_min"] <= strength <= each["bin_max"]
        assert each["values"][each["qualifying_token_index"]] == strength
        assert len(each["values"]) == len(each["tokens"])
        parts[each["bin_min"]] = each["bin_contains"]
    assert len(parts) == forms.PARTS
    assert sum(parts.values()) == pytest.approx(1)
    assert record["freq_hist_data_bar_heights"] == list(features[0].histogram)
    assert (record["pos_str"], record["pos_values"]) == ([" the", "\n"], [1.235, 1.0])


def test_only_what_is_explained_has_an_explanation(written):
    (found,) = written[2]
    assert found == {
        "modelId": "owner/model",
        "layer": "1-res-16k",
        "index": "0",
        "description": EXPLANATIONS[0],
        "explanationModelName": "a-model",
        "notes": "detection 0.75",
    }


def test_sae_dashboard_reads_every_field(written):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    for batch in written[1]:
        assert dashboard.NeuronpediaDashboardBatch(**batch).to_dict() == batch


# A feature's direction


def test_a_direction_is_what_a_clamp_adds_to_a_silent_feature(mistral_folder):
    from mistral_sae.model.language_model import load_model

    model, loaded = load_model(mistral_folder, device="cpu"), made()
    sae = SparseAutoencoder(model.d_model, F, K).requires_grad_(False)
    sae.initialize(torch.randn(20, model.d_model), seed=0)
    loaded = loaded._replace(sae=sae)
    statistics = Statistics(torch.arange(F) + 1.0, torch.full((F,), 0.1), None)
    subject, prompt = Subject(model, loaded, statistics, {}), "def load(path):"
    vector_D = forms.steering_vector(subject, Edit({3: 0.5}), prompt)
    std_T = model.residuals([model.encode(prompt)], 1)[0, 1:].std(dim=1)
    torch.testing.assert_close(vector_D, 0.5 * 4 * std_T.median() * sae.W_dec[3])
    both_D = forms.steering_vector(subject, Edit({3: 0.5, 7: -1.0}), prompt)
    torch.testing.assert_close(both_D, vector_D - 8 * std_T.median() * sae.W_dec[7])


def test_llama_cpp_finds_the_direction_at_its_layer(tmp_path):
    vector_D = torch.randn(D)
    forms.write_control_vector(tmp_path / "v.gguf", vector_D, 3)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, list(tensor.shape)) == ("direction.3", "F32", [D])
    assert torch.equal(torch.from_numpy(tensor.data.copy()), vector_D)
    assert reader.fields["general.architecture"].contents() == "controlvector"


def test_layer_0_has_no_control_vector(tmp_path):
    with pytest.raises(UserError, match="layer 0: expected a later one"):
        forms.write_control_vector(tmp_path / "v.gguf", torch.randn(D), 0)
    assert not list(tmp_path.iterdir())


def test_lm_eval_finds_all_that_it_asks_for(tmp_path):
    vector_D = torch.randn(4, D)[1]
    forms.write_steered(tmp_path / "v.pt", vector_D, 3)
    ((hook, found),) = torch.load(tmp_path / "v.pt", weights_only=True).items()
    assert hook == "layers.3"
    assert torch.equal(found.pop("steering_vector"), vector_D)
    assert found == {"steering_coefficient": 1.0, "action": "add", "bias": None}
    assert (tmp_path / "v.pt").stat().st_size < 4 * D + 4096
