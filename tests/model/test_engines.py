"""Which library runs a folder, that both agree, and what a folder must hold, found by its headers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import (
    PARAMS,
    params_of,
    random_weights,
    without_cache,
    write_byte_tokenizer,
    write_mistral_folder,
)

from mistral_sae.cli import UserError
from mistral_sae.model import engines
from mistral_sae.model.language_model import ModelError, inspect, load_model

BOTH = ("mistral-inference", "transformers")
KINDS = {
    "dense": {},
    "window": {"sliding_window": 5},
    "mixture": params_of("moe"),
    "tied": {"tied_embeddings": True},
    "theta left out": {"rope_theta": None},
}


@pytest.fixture
def copy(mistral_folder, tmp_path):
    """A mistral-inference folder to spoil."""
    return shutil.copytree(mistral_folder, tmp_path / "copy")


@pytest.fixture
def hf_copy(hugging_face_folder, tmp_path):
    """A Hugging Face folder to spoil."""
    return shutil.copytree(hugging_face_folder, tmp_path / "copy-hf")


@pytest.fixture
def both_layouts(mistral_folder, hugging_face_folder, tmp_path):
    """A folder to spoil that holds one model in both layouts."""
    folder = shutil.copytree(mistral_folder, tmp_path / "both")
    return shutil.copytree(hugging_face_folder, folder, dirs_exist_ok=True)


@pytest.fixture
def without_mistral_inference(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# Both engines


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_agree_on_a_mistral_inference_folder(kind, tmp_path, tokens_BT):
    params = PARAMS | KINDS[kind]
    folder = write_mistral_folder(tmp_path / "model", params, random_weights(params))
    one, other = (load_model(folder, device="cpu", engine=engine) for engine in BOTH)
    assert (one.engine, other.engine) == BOTH
    for layer in range(3):
        assert relative_error(other.residuals(tokens_BT, layer), one.residuals(tokens_BT, layer)) < 1e-5
    assert relative_error(other.forward(tokens_BT), one.forward(tokens_BT)) < 1e-5
    greedy = list(one.generate([1, 50, 60, 70, 80, 90, 100], 12))
    assert list(other.generate([1, 50, 60, 70, 80, 90, 100], 12)) == greedy
    assert without_cache(other, [1, 50, 60, 70, 80, 90, 100], 12) == greedy


def test_both_engines_agree_on_windows_that_take_turns(tmp_path, tokens_BT):
    params = PARAMS | {"_sliding_window": [None, 5]}
    folder = write_mistral_folder(tmp_path / "model", params, random_weights(params))
    one, other = (load_model(folder, device="cpu", engine=engine) for engine in BOTH)
    assert relative_error(other.forward(tokens_BT), one.forward(tokens_BT)) < 1e-5


def test_windows_of_two_lengths_are_refused_where_transformers_has_one(tmp_path):
    params = PARAMS | {"_sliding_window": [None, 5, 3]}
    folder = write_mistral_folder(tmp_path / "model", params, random_weights(params))
    assert inspect(folder).engine == "mistral-inference"
    with pytest.raises(ModelError, match=r"windows of 3 and 5 tokens: .*ENGINE=mistral-inference"):
        inspect(folder, "transformers")


def test_both_engines_count_the_same_parameters_and_cut_the_same_layers(folders, tokens_BT):
    one, other = (inspect(folders.mistral, engine) for engine in BOTH)
    assert one._replace(engine="", note="") == other._replace(engine="", note="")
    cut = [load_model(folders.mistral, last_layer=1, device="cpu", engine=engine) for engine in BOTH]
    assert relative_error(cut[1].residuals(tokens_BT, 1), cut[0].residuals(tokens_BT, 1)) < 1e-5


def test_half_precision_is_kept_by_both(mistral_folder, tokens_BT):
    for engine in BOTH:
        model = load_model(mistral_folder, device="cpu", dtype="bfloat16", engine=engine)
        assert model.residuals(tokens_BT, 1).dtype == torch.bfloat16


def test_without_mistral_inference_its_folder_runs_in_transformers_and_says_so(
    mistral_folder, hugging_face_folder, without_mistral_inference
):
    assert inspect(mistral_folder).run_by() == "transformers (mistral-inference is not installed)"
    assert inspect(hugging_face_folder).run_by() == "transformers"
    assert list(load_model(None, device="cpu").generate([1, 300], 3))


def test_an_engine_that_cannot_be_used_is_said(mistral_folder, hugging_face_folder, without_mistral_inference):
    with pytest.raises(ModelError, match="it is not installed here: use ENGINE=transformers"):
        inspect(mistral_folder, "mistral-inference")
    with pytest.raises(ModelError, match=r"has no params\.json: use ENGINE=transformers"):
        inspect(hugging_face_folder, "mistral-inference")
    with pytest.raises(UserError, match="ENGINE is 'vllm': expected mistral-inference or transformers"):
        inspect(mistral_folder, "vllm")


def test_an_apple_gpu_is_taken_where_there_is_one(monkeypatch):
    from mistral_sae.model.language_model import device_and_dtype

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_and_dtype("mps", None) == (torch.device("mps"), torch.float32)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match="found no Apple GPU for 'mps'"):
        device_and_dtype("mps", None)


# Folders of both layouts


def test_of_both_layouts_mistral_inferences_is_taken(both_layouts):
    assert inspect(both_layouts).run_by() == "mistral-inference"
    assert inspect(both_layouts, "transformers").run_by() == "transformers"


def test_of_both_layouts_the_second_is_taken_where_the_first_cannot_be_read(both_layouts, tokens_BT):
    whole = load_model(both_layouts, device="cpu", engine="transformers").forward(tokens_BT)
    edit(both_layouts / "params.json", yarn={"factor": 16})
    assert "transformers (not by its params.json: " in inspect(both_layouts).run_by()
    assert "sets yarn" in inspect(both_layouts).note
    assert torch.equal(load_model(both_layouts, device="cpu").forward(tokens_BT), whole)
    edit(both_layouts / "config.json", model_type="gemma")
    with pytest.raises(ModelError, match=r"sets yarn.*; .*'gemma': expected one of"):
        inspect(both_layouts)


def test_transformers_falls_back_on_params_where_it_cannot_read_config(both_layouts, tokens_BT):
    whole = load_model(both_layouts, device="cpu").forward(tokens_BT)
    edit(both_layouts / "config.json", num_hidden_layers=5)
    assert r"no tensor model.layers.3" in inspect(both_layouts, "transformers").note
    assert (
        relative_error(load_model(both_layouts, device="cpu", engine="transformers").forward(tokens_BT), whole) < 1e-5
    )


# Shards


def shard(folder, stem, index):
    """Spread a folder's weights over three files."""
    weights = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for i in range(3):
        file = f"{stem}-{i + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[i::3]}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_model_with_their_index_and_without(copy, hf_copy, hugging_face_folder, tokens_BT, index):
    whole = load_model(hugging_face_folder, device="cpu").forward(tokens_BT)
    assert torch.equal(load_model(shard(hf_copy, "model", index), device="cpu").forward(tokens_BT), whole)
    in_shards = load_model(shard(copy, "consolidated", index), device="cpu").forward(tokens_BT)
    assert relative_error(in_shards, whole) < 1e-5


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("stem", ["model", "consolidated"])
def test_a_missing_shard_is_named_before_anything_is_loaded(copy, hf_copy, stem, index):
    folder = shard(hf_copy if stem == "model" else copy, stem, index)
    (folder / f"{stem}-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=f"has no {stem}-00002-of-00003.safetensors: expected 3 files of weights"):
        inspect(folder)


# Quantized weights


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantized_folder_is_named(hf_copy, method):
    edit(hf_copy / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"is quantized \({method}\): expected 16 or 32 bits a weight"):
        inspect(hf_copy)


def test_weights_of_8_bits_are_named_whatever_the_configuration_says(copy):
    weights = load_file(copy / "consolidated.safetensors")
    weights["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].to(torch.float8_e4m3fn)
    save_file(weights | {"layers.0.attention.wq.qscale_weight": torch.ones(1)}, copy / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"is quantized \(F8_E4M3\): expected 16 or 32 bits a weight"):
        inspect(copy)


# A tokenizer beside the wrong model


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_named(hf_copy):
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_copy)
    tokenizer.add_tokens([AddedToken(f"<|{i}|>", normalized=False) for i in range(4096 - len(tokenizer))])
    tokenizer.save_pretrained(hf_copy)
    assert inspect(hf_copy).vocab_size == 4096
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save_pretrained(hf_copy)
    with pytest.raises(ModelError, match="has ids up to 4097: expected at most 4095, as the embedding has 4096 rows"):
        inspect(hf_copy)


def test_a_tokenizer_of_mistral_common_is_held_against_the_embedding(copy):
    write_byte_tokenizer(copy)  # which this layout does not read
    params = PARAMS | {"vocab_size": 4000}
    (copy / "params.json").write_text(json.dumps(params))
    save_file(random_weights(params), copy / "consolidated.safetensors")
    with pytest.raises(ModelError, match="has ids up to 4095: expected at most 3999"):
        inspect(copy)
