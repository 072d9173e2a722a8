"""A run goes to a local stand-in of the hub, and comes back to us and to SAE Lens."""

import json

import pytest
import torch
import yaml
from hub_server import COMMIT

from mistral_sae.cli import Failed, UserError
from mistral_sae.files import SAEError
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, load_sae, save_sae
from mistral_sae.sae.features import Statistics
from mistral_sae.share import hub as share

D, F, K = 16, 64, 4
HOOK = "blocks.2.hook_resid_post"
FIGURES = {"tokens": 1234, "l0": 4.0, "normalized_mse": 0.1234, "ce_loss_recovered": 0.978, "dead_fraction": 0.01}


def write_run(folder, layer=2, text="owner/text"):
    sae = SparseAutoencoder(D, F, K)
    sae.initialize(torch.randn(20, D), seed=layer)
    metadata = Metadata("a-model", f"blocks.{layer}.hook_resid_post", layer, True, 64, text)
    save_sae(folder / "sae", sae, metadata, Statistics(torch.ones(F), torch.full((F,), 0.1), None))
    (folder / "evaluation.json").write_text(json.dumps(FIGURES))
    (folder / "training.png").write_bytes(b"a picture")
    (folder / "metrics.jsonl").write_text("")
    return sae


@pytest.fixture
def run_dir(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pushed(run_dir, hub, tmp_path):
    """The hub's folder after a push, while the hub answers, and what it was asked to make."""
    folder = tmp_path / "hub"
    folder.mkdir()
    with hub(folder, name="me/mine") as asked:
        members = share.members_of(run_dir)
        address = share.push("me/mine", share.files_of(members), share.card("me/mine", members, "owner/base@v1"))
        assert address.endswith(COMMIT)
        yield folder, asked


def test_what_was_pushed_is_loaded_by_its_name_on_the_hub(pushed, run_dir):
    mine = load_sae(run_dir)
    for source in (f"me/mine/{HOOK}", f"me/mine/{HOOK}@{COMMIT}"):
        loaded = load_sae(source)
        assert torch.equal(loaded.sae.W_enc, mine.sae.W_enc)
        assert loaded.metadata == mine.metadata
        assert torch.equal(loaded.maximum_F, mine.maximum_F)


def test_sae_lens_loads_it_as_the_card_says(sae_lens, pushed, run_dir):
    theirs = sae_lens.SAE.from_pretrained("me/mine", HOOK)
    assert f'SAE.from_pretrained("me/mine", "{HOOK}")' in (pushed[0] / "README.md").read_text()
    x = torch.randn(30, D)
    mine = load_sae(run_dir).sae
    torch.testing.assert_close(theirs.encode(x), mine.encode(x).dense(F))


def test_a_new_repository_is_private(pushed):
    assert json.loads(pushed[1][0])["visibility"] == "private"


def test_a_repository_lists_what_it_holds(pushed):
    with pytest.raises(SAEError, match=f"found an autoencoder below me/mine, .*set SAE_PATH=me/mine/{HOOK}$"):
        load_sae("me/mine")
    with pytest.raises(SAEError, match=f"set SAE_PATH=me/mine/{HOOK}@main$"):
        load_sae("me/mine@main")


def test_what_the_hub_does_not_let_write_is_one_line(run_dir, hub, tmp_path):
    members = share.members_of(run_dir)
    with hub(tmp_path, name="me/mine", gated=True), pytest.raises(Failed, match="could not push to me/mine") as error:
        share.push("me/mine", share.files_of(members), "card")
    assert "\n" not in str(error.value)


def test_only_what_others_need_is_sent(run_dir):
    names = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "evaluation.json", "training.png"]
    assert list(share.files_of(share.members_of(run_dir))) == [f"{HOOK}/{name}" for name in names]


def test_a_damaged_log_which_is_not_sent_stops_no_push(run_dir):
    (run_dir / "metrics.jsonl").write_text("damaged\n")
    assert share.members_of(run_dir)[0].figures == FIGURES


def test_the_card_tells_the_base_model_the_text_and_the_figures(run_dir):
    card = share.card("me/mine", share.members_of(run_dir), "owner/base@v1")
    data = yaml.safe_load(card.split("---")[1])
    assert data["base_model"] == "owner/base"
    assert data["datasets"] == ["owner/text"]
    assert data["library_name"] == data["tags"][0] == "saelens"
    assert "of owner/base (revision v1), trained on owner/text" in card
    assert f"| `{HOOK}` | 2 | 16 | 64 | topk, K=4 | 0.123 | 4.0 | 97.8% | 1.0% | 1,234 |" in card
    assert 'load_model("owner/base@v1")' in card
    assert f"![training curves]({HOOK}/training.png)" in card


@pytest.mark.parametrize(("model", "load"), [(None, "None"), ("/models/mine", '"the folder of a-model"')])
def test_a_model_that_is_not_on_the_hub_is_no_base_model(tmp_path, model, load):
    write_run(tmp_path, text="/data/text.jsonl")
    card = share.card("me/mine", share.members_of(tmp_path), model)
    data = yaml.safe_load(card.split("---")[1])
    assert not {"base_model", "datasets"} & set(data)
    assert f"load_model({load})" in card


def test_a_grid_is_shared_as_a_whole(tmp_path):
    points = []
    for layer in (1, 2):
        write_run(tmp_path / f"layer{layer}", layer)
        point = {"name": f"layer{layer}", "layer": layer, "architecture": "topk", "d_hidden": F, "k": K}
        points.append(point | {"learning_rate": 1e-3, "seed": 0})
    points.append(points[0] | {"name": "layer3", "stopped": "its loss exploded"})
    (tmp_path / "sweep.json").write_text(json.dumps(points))
    members = share.members_of(tmp_path)
    assert {name.partition("/")[0] for name in share.files_of(members)} == {"layer1", "layer2"}
    card = share.card("me/mine", members, None)
    assert "Sparse autoencoders of a-model" in card
    assert "`layer1` | 1 |" in card
    assert "`layer2` | 2 |" in card


def test_a_run_without_an_autoencoder_is_one_line(tmp_path):
    with pytest.raises(SAEError, match=r"cfg\.json"):
        share.members_of(tmp_path)


@pytest.mark.parametrize("name", ["mine", "me/mine/more", "me/", "https://huggingface.co/me/mine", "me/mi ne"])
def test_a_name_that_the_hub_cannot_have_is_refused(name):
    with pytest.raises(UserError, match="expected owner/name"):
        share.check_repository(name)
