"""Every type of model in Hugging Face's layout, small and random: transformers' own load of the folder is right."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import without_cache, write_byte_tokenizer

from mistral_sae.model.language_model import ModelError, Row, inspect, load_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = {"max_position_embeddings": 256, "rope_parameters": YARN}
WINDOWED = {"sliding_window": 5, "layer_types": ["full_attention", *["sliding_attention"] * 3]}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 16,
}
CASES = {
    "mistral": ("MistralForCausalLM", {}),
    "mistral, window": ("MistralForCausalLM", {"sliding_window": 5}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "ministral": ("MinistralForCausalLM", WINDOWED),
    "ministral3": ("Ministral3ForCausalLM", MINISTRAL3),
    "llama": ("LlamaForCausalLM", {"attention_bias": True}),
    "mistral3 of mistral": ("Mistral3ForConditionalGeneration", {"model_type": "mistral"}),
    "mistral3 of ministral3": ("Mistral3ForConditionalGeneration", {"model_type": "ministral3", **MINISTRAL3}),
}


def made(name: str, tied: bool):
    """A random model of transformers, without this project's code."""
    import transformers

    torch.manual_seed(0)
    class_name, extra = CASES[name]
    kind = getattr(transformers, class_name)
    sizes = SIZES | extra | {"initializer_range": 0.3}
    if name.startswith("mistral3"):
        config = kind.config_class(text_config=sizes, vision_config=VISION, tie_word_embeddings=tied)
    else:
        config = kind.config_class(**sizes, tie_word_embeddings=tied)
    config._attn_implementation = "sdpa"
    return kind(config).eval()


@pytest.fixture(scope="module", params=[(name, tied) for name in CASES for tied in (False, True)], ids=str)
def pair(request, tmp_path_factory):
    """A folder that transformers wrote, and its model."""
    reference = made(*request.param)
    folder = tmp_path_factory.mktemp("model") / "model"
    reference.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder, reference


def body_of(reference):
    return getattr(reference.model, "language_model", reference.model)


def residuals_of_reference(reference, tokens_BT):
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in body_of(reference).layers
    ]
    with torch.no_grad():
        logits = reference(input_ids=tokens_BT).logits
    for handle in handles:
        handle.remove()
    return outputs, logits


@pytest.fixture
def tokens_BT():
    return torch.randint(20, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def test_residuals_and_logits_are_those_of_transformers(pair, tokens_BT):
    folder, reference = pair
    model = load_model(folder, device="cpu")
    expected, logits = residuals_of_reference(reference, tokens_BT)
    for layer, residuals in enumerate(expected):
        assert torch.equal(model.residuals(tokens_BT, layer), residuals)
    assert torch.equal(model.forward(tokens_BT), logits)


def test_greedy_text_is_that_of_transformers_with_the_cache_and_without(pair, monkeypatch):
    folder, reference = pair
    model = load_model(folder, device="cpu")
    monkeypatch.setattr(model.tokenizer, "eos_id", -1)
    prompt = [1, 50, 60, 70, 80, 90, 100, 110]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert list(model.generate(prompt, 12)) == expected
    assert without_cache(model, prompt, 12) == expected
    beside = [Row.of(ids, 0.0, 0) for ids in (prompt, [1, *range(50, 70)], [1, 50])]  # which is longer, or shorter
    assert [ids[0] for ids in model.next_tokens(beside, 12)] == expected


def test_a_cut_model_has_the_residuals_of_the_whole(pair, tokens_BT):
    folder, _ = pair
    whole, cut = load_model(folder, device="cpu"), load_model(folder, device="cpu", last_layer=1)
    assert torch.equal(cut.residuals(tokens_BT, 1), whole.residuals(tokens_BT, 1))


def test_the_parameters_of_the_text_are_counted_before_the_load(pair):
    folder, reference = pair
    heads = [] if reference.config.tie_word_embeddings else [reference.lm_head.weight]
    expected = sum(parameter.numel() for parameter in [*body_of(reference).parameters(), *heads])
    spec = inspect(folder)
    assert (spec.d_model, spec.n_layers, spec.vocab_size) == (32, 4, 300)
    assert spec.parameters() == expected


@pytest.fixture
def mistral3(tmp_path) -> Path:
    folder = tmp_path / "model"
    made("mistral3 of ministral3", False).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_is_found_under_the_names_of_old_and_of_new_files(mistral3, prefix, tokens_BT):
    expected = load_model(mistral3, device="cpu").forward(tokens_BT)
    renamed = {}
    for name, tensor in load_file(mistral3 / "model.safetensors").items():
        text = name.split("language_model.")[-1].removeprefix("model.")
        if "vision" in name or "projector" in name:
            renamed[name] = tensor
        elif name.endswith("lm_head.weight"):
            renamed["language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"] = tensor
        else:
            renamed[prefix + text] = tensor
    save_file(renamed, mistral3 / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(mistral3, device="cpu").forward(tokens_BT), expected)


def test_a_ministral_without_a_window_has_full_attention(tmp_path, tokens_BT):
    reference = made("ministral", False)
    for name, window in (("full", None), ("wide", 4096)):
        reference.config.sliding_window, reference.config.layer_types = window, ["full_attention"] * 4
        reference.save_pretrained(tmp_path / name)
        write_byte_tokenizer(tmp_path / name)
    full, wide = (load_model(tmp_path / name, device="cpu").forward(tokens_BT) for name in ("full", "wide"))
    assert torch.equal(full, wide)


def test_a_text_model_of_another_type_is_named(mistral3):
    config = json.loads((mistral3 / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma"
    (mistral3 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'gemma': expected one of mistral, mixtral"):
        inspect(mistral3)


def test_a_body_without_a_head_is_enough_up_to_a_layer(tmp_path, tokens_BT):
    reference = made("llama", False)
    folder = tmp_path / "body"
    reference.model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    residuals, _ = residuals_of_reference(reference, tokens_BT)
    assert torch.equal(load_model(folder, device="cpu", last_layer=2).residuals(tokens_BT, 2), residuals[2])
    with pytest.raises(ModelError, match=r"no tensor lm_head\.weight"):
        load_model(shutil.copytree(folder, tmp_path / "copy"), device="cpu")
