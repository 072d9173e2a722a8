"""Models that are no folder here yet: names on the hub, which a local server plays, and GGUF files."""

import json
import shutil

import pytest
import torch
from hub_server import COMMIT

from mistral_sae.model import source
from mistral_sae.model.language_model import ModelError, inspect, load_model
from tools.weights import write_gguf

# The hub


@pytest.fixture
def both_layouts(mistral_folder, hugging_face_folder, tmp_path):
    folder = shutil.copytree(mistral_folder, tmp_path / "both")
    return shutil.copytree(hugging_face_folder, folder, dirs_exist_ok=True)


def test_a_plan_takes_the_headers_and_no_weights_and_a_load_those_of_one_layout(hub, both_layouts, tokens_BT):
    here = load_model(both_layouts, device="cpu")
    with hub(both_layouts) as asked:
        spec = inspect("owner/model")
        assert spec._replace(name="") == inspect(both_layouts)._replace(name="")
        assert spec.name == "owner/model"
        assert "consolidated.safetensors" in asked
        assert not [name for name in asked if name.endswith(".safetensors+")]
        model = load_model("owner/model", device="cpu")
        assert [name for name in asked if name.endswith(".safetensors+")] == ["consolidated.safetensors+"]
        assert torch.equal(model.forward(tokens_BT), here.forward(tokens_BT))
        del asked[:]
        assert load_model(f"owner/model@{COMMIT}", device="cpu").name == "owner/model"
        assert asked == []


def test_the_layout_is_chosen_by_the_headers_before_weights_are_fetched(hub, both_layouts, tokens_BT):
    params = json.loads((both_layouts / "params.json").read_text()) | {"yarn": {"factor": 16}}
    (both_layouts / "params.json").write_text(json.dumps(params))
    with hub(both_layouts) as asked:
        assert "sets yarn" in inspect("owner/model").note
        model = load_model("owner/model", device="cpu")
        assert [name for name in asked if name.endswith(".safetensors+")] == ["model.safetensors+"]
    assert torch.equal(model.forward(tokens_BT), load_model(both_layouts, device="cpu").forward(tokens_BT))


def test_what_was_fetched_works_without_the_hub(hub, mistral_folder, monkeypatch):
    with hub(mistral_folder):
        load_model("owner/model", device="cpu")
    assert load_model("owner/model", device="cpu").name == "owner/model"  # the server is gone
    with pytest.raises(ModelError, match=r"owner/other is no folder here, and the hub cannot be asked for it"):
        inspect("owner/other")


def test_a_name_that_the_hub_does_not_know_or_show_says_what_to_do(hub, mistral_folder):
    with hub(mistral_folder):
        with pytest.raises(ModelError, match="neither a folder here nor a model that the hub shows you"):
            inspect("owner/mistake")
        with pytest.raises(ModelError, match="has no revision 'v9': expected a branch, a tag or a commit"):
            inspect("owner/model@v9")
    with (
        hub(mistral_folder, gated=True),
        pytest.raises(ModelError, match=r"is gated: accept its terms at https://hugg"),
    ):
        inspect("owner/model")


# GGUF


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A small random Llama in 16 bits, as llama.cpp stores it, with a byte-level tokenizer."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny-chat.f16.gguf")
    return tmp_path / "tiny-chat.f16.gguf"


def test_a_gguf_file_is_the_model_that_transformers_reads_in_it(gguf_file):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
    ).eval()
    tokens_BT = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    model = load_model(gguf_file, device="cpu")
    with torch.no_grad():
        expected = reference(tokens_BT).logits
    assert (model.forward(tokens_BT) - expected).norm() < 2e-3 * expected.norm()  # kept in 16 bits
    assert (model.name, model.spec.run_by()) == (
        "tiny-chat.f16",
        "transformers (weights of F16, from tiny-chat.f16.gguf)",
    )
    assert model.context_length == 128


def test_a_gguf_file_of_endless_layers_is_refused_at_once(gguf_file):
    content, key = gguf_file.read_bytes(), b"llama.block_count"
    at = content.index(key) + len(key) + 4  # behind the type of its value
    gguf_file.write_bytes(content[:at] + (10**9).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(
        ModelError, match=r"says that it has 1000000000 layers and has 29 tensors: expected some for each"
    ):
        load_model(gguf_file, device="cpu")


def test_other_tools_can_open_the_folder_that_it_was_converted_to(gguf_file):
    folder = source.from_gguf(gguf_file).path
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_its_tokenizer_comes_with_it(gguf_file):
    tokenizer = load_model(gguf_file, device="cpu").tokenizer
    text = "def f(a): return 'é' + a"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text)) == text.encode()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}])) == "hi"


def test_a_file_is_converted_once_and_again_when_it_changes(gguf_file, capsys):
    first = inspect(gguf_file)
    assert capsys.readouterr().out.startswith("converting tiny-chat.f16.gguf, once and into ")
    assert inspect(gguf_file) == first
    assert capsys.readouterr().out == ""
    with open(gguf_file, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\1\1")
    inspect(gguf_file)
    assert "converting" in capsys.readouterr().out


def test_a_file_that_is_not_whole_leaves_nothing_behind(gguf_file, tmp_path):
    gguf_file.write_bytes(gguf_file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be read by transformers"):
        inspect(gguf_file)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_gguf_file_of_another_kind_of_model_is_named(gguf_file, monkeypatch):
    monkeypatch.setattr(source, "MODEL_TYPES", ["mistral"])
    with pytest.raises(ModelError, match="is of model type llama: expected mistral"):
        inspect(gguf_file)
