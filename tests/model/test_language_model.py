"""The language model: equal to transformers, causal, cut at a layer, and clear about what it cannot load."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import PARAMS, WINDOW, params_of, random_weights, without_cache, write_mistral_folder

from mistral_sae.model import engines, language_model
from mistral_sae.model.language_model import (
    STANDIN,
    ModelError,
    Row,
    device_and_dtype,
    inspect,
    load_model,
    why_no_gpu,
)
from tools.weights import from_hf, to_hf

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module", params=["mistral", "hugging_face"])
def model(request, folders):
    return load_model(getattr(folders, request.param), device="cpu")


@pytest.fixture(scope="module")
def reference(folders):
    return folders.reference()


@pytest.fixture
def copy(mistral_folder, tmp_path):
    """A mistral-inference folder to spoil."""
    return shutil.copytree(mistral_folder, tmp_path / "copy")


@pytest.fixture
def hf_copy(hugging_face_folder, tmp_path):
    """A Hugging Face folder to spoil."""
    return shutil.copytree(hugging_face_folder, tmp_path / "copy")


def reference_residuals(model, tokens_BT):
    """The outputs of all layers of transformers' model, (layers, B, T, D)."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=tokens_BT).logits
    for handle in handles:
        handle.remove()
    return torch.stack(outputs), logits


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_a_fingerprint_is_of_the_weights_whatever_runs_them(folders, copy):
    whole = load_model(folders.mistral, device="cpu")
    ours = whole.fingerprint(1)
    for options in ({"engine": "transformers"}, {"dtype": "bfloat16"}, {"last_layer": 1}):
        assert load_model(folders.mistral, device="cpu", **options).fingerprint(1) == ours
    assert load_model(folders.hugging_face, device="cpu").fingerprint(1) == ours
    assert whole.fingerprint(0) != ours
    weights = load_file(folders.mistral / "consolidated.safetensors")
    weights["layers.1.attention.wv.weight"] *= 1.01
    shutil.copy(folders.mistral / "params.json", copy)
    save_file(weights, copy / "consolidated.safetensors")
    tuned = load_model(copy, device="cpu")
    assert tuned.fingerprint(1) != ours
    assert tuned.fingerprint(0) == whole.fingerprint(0)


# Equal to transformers


def test_residuals_of_every_layer_equal_those_of_transformers(model, reference, tokens_BT):
    expected, logits = reference_residuals(reference, tokens_BT)
    for layer in range(3):
        assert relative_error(model.residuals(tokens_BT, layer), expected[layer]) < 1e-5
    assert relative_error(model.forward(tokens_BT), logits) < 1e-5


def test_greedy_text_equals_that_of_transformers_with_the_cache_on_and_off(model, reference):
    prompt = [1, 50, 60, 70, 80, 90, 100, 110]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert list(model.generate(prompt, 20)) == expected
    assert without_cache(model, prompt, 20) == expected


def test_unembedding_the_last_residual_gives_the_logits(model, tokens_BT):
    logits = model.forward(tokens_BT)
    unembedded = model.unembed(model.residuals(tokens_BT, model.n_layers - 1).flatten(0, 1))
    assert relative_error(unembedded, logits.flatten(0, 1)) < 1e-5
    assert torch.allclose(
        model.unembed(torch.eye(model.d_model)), model.unembed(3 * torch.eye(model.d_model)), atol=1e-3
    )


def test_unembedding_is_in_float32_whatever_the_model_is_in(mistral_folder, monkeypatch):
    """bfloat16 has ties among the strongest tokens, and it is what a model is in on a GPU."""
    monkeypatch.setattr(language_model, "UNEMBEDDED", 7)  # rows at a time
    half, rows = load_model(mistral_folder, device="cpu", dtype="bfloat16"), torch.eye(32)
    whole = load_model(mistral_folder, device="cpu", dtype="float32")
    parts = [(model._engine.norm, model._engine.head) for model in (half, whole)]
    for mine, theirs in zip(*parts, strict=True):
        theirs.load_state_dict({name: tensor.float() for name, tensor in mine.state_dict().items()})
    assert half.unembed(rows).dtype == torch.float32
    torch.testing.assert_close(half.unembed(rows), whole.unembed(rows), rtol=1e-5, atol=1e-5)


def test_the_window_of_the_sliding_window_model_matters(tmp_path, tokens_BT):
    params = params_of("sliding_window")
    weights = random_weights(params)
    windowed = load_model(write_mistral_folder(tmp_path / "a", params, weights), device="cpu")
    full = load_model(write_mistral_folder(tmp_path / "b", params | {"sliding_window": None}, weights), device="cpu")
    a, b = windowed.residuals(tokens_BT, 0), full.residuals(tokens_BT, 0)
    torch.testing.assert_close(a[:, :WINDOW], b[:, :WINDOW])
    assert (a - b)[:, WINDOW:].abs().amax(-1).min() > 1e-3


def test_weights_survive_the_way_to_the_other_layout_and_back():
    for kind in ("gqa", "moe"):
        weights = random_weights(params_of(kind))
        there = to_hf(weights, PARAMS["head_dim"])
        back = from_hf(there, PARAMS["head_dim"])
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weights[name]) for name in weights)


# Causal, and rows apart


def test_editing_a_token_changes_no_residual_before_it(model, tokens_BT):
    edited = tokens_BT.clone()
    edited[:, 7] = 15
    before, after = model.residuals(tokens_BT, 2), model.residuals(edited, 2)
    # Not to the bit: an expert's matrix product rounds by how many tokens it gets
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-6)
    assert (before - after)[:, 7:9].abs().amax(-1).min() > 1e-4


def test_a_row_does_not_depend_on_the_other_rows(model, tokens_BT):
    together = model.residuals(tokens_BT, 2)
    others = tokens_BT.clone()
    others[1:] = 33
    torch.testing.assert_close(model.residuals(others, 2)[0], together[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.residuals(tokens_BT[:1], 2)[0], together[0], rtol=1e-5, atol=1e-6)


# Only the layers that are needed


@pytest.mark.parametrize("layout", ["mistral", "hugging_face"])
def test_a_model_cut_at_a_layer_has_the_residuals_of_the_whole(folders, layout, tokens_BT):
    path = getattr(folders, layout)
    whole, cut = load_model(path, device="cpu"), load_model(path, last_layer=1, device="cpu")
    assert cut.last_layer == 1
    assert cut.n_layers == 3
    for layer in (0, 1):
        assert torch.equal(cut.residuals(tokens_BT, layer), whole.residuals(tokens_BT, layer))
    with pytest.raises(ModelError, match="found layer 2: expected 0 to 1"):
        cut.residuals(tokens_BT, 2)
    with pytest.raises(ModelError, match="logits need the whole model"):
        cut.forward(tokens_BT)


def test_only_the_tensors_of_the_layers_that_are_needed_are_read(mistral_folder, monkeypatch):
    read = []
    original = engines._read_tensors

    def spy(wanted, *rest):
        read.extend(wanted)
        return original(wanted, *rest)

    monkeypatch.setattr(engines, "_read_tensors", spy)
    load_model(mistral_folder, last_layer=1, device="cpu")
    assert {name.split(".")[1] for name in read if name.startswith("layers")} == {"0", "1"}
    assert [name for name in read if not name.startswith("layers")] == ["tok_embeddings.weight"]


def test_a_cut_model_loads_although_the_other_tensors_are_not_there(copy, tokens_BT):
    weights = load_file(copy / "consolidated.safetensors")
    first = {k: v for k, v in weights.items() if k.startswith(("tok_embeddings", "layers.0.", "layers.1."))}
    save_file(first, copy / "consolidated.safetensors")
    assert load_model(copy, last_layer=1, device="cpu").residuals(tokens_BT, 1).isfinite().all()
    with pytest.raises(ModelError, match=r"no tensor norm\.weight"):
        load_model(copy, device="cpu")


def test_weights_in_several_files_are_one_model(copy, mistral_folder, tokens_BT):
    weights = load_file(copy / "consolidated.safetensors")
    (copy / "consolidated.safetensors").unlink()
    names = list(weights)
    save_file({k: weights[k] for k in names[::2]}, copy / "consolidated-00001-of-00002.safetensors")
    save_file({k: weights[k] for k in names[1::2]}, copy / "consolidated-00002-of-00002.safetensors")
    whole = load_model(mistral_folder, device="cpu")
    assert torch.equal(load_model(copy, device="cpu").forward(tokens_BT), whole.forward(tokens_BT))


# What is known before loading


@pytest.mark.parametrize("layout", ["mistral", "hugging_face"])
def test_inspect_counts_the_parameters_that_loading_makes(folders, layout):
    spec = inspect(getattr(folders, layout))
    assert (spec.d_model, spec.n_layers, spec.vocab_size) == (32, 3, 4096)
    count = sum(p.numel() for p in folders.reference().parameters())
    assert spec.parameters() == count
    assert spec.parameters(2) == count - 4096 * 32 - 32
    assert spec.parameters(0) == 4096 * 32 + spec.layer_parameters[0]


def test_no_path_is_the_bundled_model():
    model = load_model(None, last_layer=0, device="cpu")
    assert model.name == STANDIN.name
    assert inspect(STANDIN).engine == "mistral-inference"


def test_loading_and_running_print_nothing(mistral_folder, hugging_face_folder):
    code = f"""
import torch
from mistral_sae.model.language_model import load_model

for path in {str(mistral_folder)!r}, {str(hugging_face_folder)!r}:
    load_model(path, last_layer=1).residuals(torch.tensor([[1, 2, 3]]), 1)
    list(load_model(path).generate([1, 2, 3], 4))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_nothing_requires_a_gradient(model, tokens_BT):
    assert not any(p.requires_grad for layer in range(3) for p in model.block(layer).parameters())
    x_BTD = model.residuals(tokens_BT, 1)
    assert not x_BTD.requires_grad
    assert not x_BTD.is_inference()  # an SAE can be trained on it
    assert not model.block(0).training


# Generation


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(mistral_folder):
    model = load_model(mistral_folder, device="cpu")
    options = {"max_tokens": 8, "temperature": 1.0}
    state = torch.get_rng_state()
    first = list(model.generate([1, 50], seed=3, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.generate([1, 50], seed=3, **options)) == first
    assert without_cache(model, [1, 50], 8, Row.of([1, 50], 1.0, seed=3)) == first
    assert list(model.generate([1, 50], seed=4, **options)) != first


def test_generation_stops_at_the_end_of_sequence_token(mistral_folder, monkeypatch):
    model = load_model(mistral_folder, device="cpu")
    text = list(model.generate([1, 50], 10))
    monkeypatch.setattr(model.tokenizer, "eos_id", text[4])
    assert list(model.generate([1, 50], 10)) == text[: text.index(text[4])]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_of_samples_has_the_texts_that_are_generated_one_by_one(model, temperature):
    batch = model.sample([1, 50, 60], [0, 7, 7], 10, temperature)
    assert batch == [list(model.generate([1, 50, 60], 10, temperature, seed=seed)) for seed in (0, 7, 7)]
    assert (batch[0] == batch[1]) == (temperature == 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_that_are_begun_end_as_if_they_were_not(model, temperature):
    whole = model.sample([1, 50, 60], [0, 7], 10, temperature)
    for begun in ((whole[0][:4], whole[1][:6]), ([], whole[1]), whole):
        assert model.sample([1, 50, 60], [0, 7], 10, temperature, begun=begun) == whole


def test_rows_of_several_lengths_have_the_logits_and_the_texts_of_each_alone(model, monkeypatch):
    several = [([1, *range(50, 50 + n)], temperature) for n, temperature in ((1, 0.0), (11, 0.8), (4, 0.8), (0, 2.0))]
    seen = []
    monkeypatch.setattr(model, "check_finite", lambda logits_BV, _: seen.append(logits_BV))

    def made(which):
        seen.clear()
        rows = [Row.of(*several[i], seed=i) for i in which]
        return list(model.next_tokens(rows, 10)), torch.stack(seen, dim=1)

    together, logits_BTV = made(range(4))
    for i in range(4):
        alone, alone_1TV = made([i])
        assert [ids[i] for ids in together] == [id for (id,) in alone]
        torch.testing.assert_close(logits_BTV[i], alone_1TV[0], rtol=1e-4, atol=1e-4)


def test_a_sample_ends_where_the_model_ends_it_and_the_others_go_on(mistral_folder, monkeypatch):
    model = load_model(mistral_folder, device="cpu")
    whole = model.sample([1, 50, 60], [0, 1], 10, 1.0)
    monkeypatch.setattr(model.tokenizer, "eos_id", whole[0][4])
    assert model.sample([1, 50, 60], [0, 1], 10, 1.0) == [whole[0][:4], whole[1]]


def test_log_probabilities_are_of_the_next_token_and_spare_the_first_position(model, tokens_BT):
    plain = model.log_probabilities(tokens_BT)
    torch.testing.assert_close(plain, model.forward(tokens_BT)[:, :-1].log_softmax(dim=-1))
    shapes = []
    replaced = model.log_probabilities(tokens_BT, 1, lambda x: (shapes.append(x.shape), torch.zeros_like(x))[1])
    assert shapes == [(3, 11, 32)]
    torch.testing.assert_close(replaced[:, 0], plain[:, 0])  # up to rounding: experts get other batches
    assert (replaced[:, 1:] - plain[:, 1:]).abs().amax(dim=-1).min() > 0.01


# Mistakes


def test_mistakes_in_the_call_are_named(mistral_folder, tokens_BT):
    model = load_model(mistral_folder, device="cpu")
    with pytest.raises(ModelError, match="found token id 4096: expected 0 to 4095"):
        model.forward(torch.tensor([[1, 4096]]))
    with pytest.raises(ModelError, match="expected 0 to 2, as tiny has 3 layers"):
        model.residuals(tokens_BT, 3)
    with pytest.raises(ModelError, match="expected 0 to 2, as tiny has 3 layers"):
        load_model(mistral_folder, last_layer=3)
    with pytest.raises(ModelError, match="empty prompt"):
        next(model.generate([], 3))
    with pytest.raises(ModelError, match="float33"):
        load_model(mistral_folder, dtype="float33")
    with pytest.raises(ModelError, match="expected cpu, cuda"):
        load_model(mistral_folder, device="gpu")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="is not a folder"):
        inspect(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"holds no model: expected params\.json"):
        inspect(tmp_path)


def test_pickled_weights_are_refused_unread(copy):
    (copy / "consolidated.safetensors").unlink()
    (copy / "consolidated.00.pth").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"only consolidated\.00\.pth, which is pickled.*safetensors"):
        load_model(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"found model_type = 'mamba' in .*params\.json, expected 'transformer'"),
        ({"hidden_dim": 64}, r"feed_forward.w1.weight in .* has shape \(48, 32\): expected \(64, 32\)"),
        ({"yarn": {"factor": 4}}, "sets yarn"),
        ({"n_layers": 4}, r"no tensor layers\.3"),
    ],
)
def test_params_that_do_not_fit_are_named(copy, change, message):
    (copy / "params.json").write_text(json.dumps(PARAMS | change))
    with pytest.raises(ModelError, match=message):
        inspect(copy)
    with pytest.raises(ModelError, match=message):
        load_model(copy, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "'gemma': expected one of mistral, mixtral"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"is quantized \(gptq\): expected 16 or 32 bits",
        ),
        ({"intermediate_size": 64}, r"has shape \(.*48.*\): expected \(.*64.*\)"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3"),
    ],
)
def test_a_config_that_does_not_fit_is_named(hf_copy, change, message):
    config = json.loads((hf_copy / "config.json").read_text())
    (hf_copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_model(hf_copy, device="cpu")


def test_half_a_file_is_named(copy):
    weights = copy / "consolidated.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="is cut short or no safetensors file"):
        inspect(copy)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="is cut short or no safetensors file"):
        inspect(copy)


def test_a_missing_tokenizer_is_named(copy, hf_copy_without_tokenizer):
    (copy / "tekken.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer: expected tekken\.json"):
        load_model(copy)
    with pytest.raises(ModelError, match=r"no tokenizer: expected tokenizer\.json"):
        load_model(hf_copy_without_tokenizer)


@pytest.fixture
def hf_copy_without_tokenizer(hugging_face_folder, tmp_path):
    return shutil.copytree(hugging_face_folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*token*"))


# The tokenizer

TEXT = "def größe(x):\n\treturn '日本 🎉' + x  # <s>[INST] </s>\r\n"


def sentencepiece_folder(copy):
    import mistral_common

    shutil.rmtree(copy)
    params = PARAMS | {"vocab_size": 32768}
    write_mistral_folder(copy, params, random_weights(params))
    (copy / "tekken.json").unlink()
    shutil.copy(
        f"{mistral_common.__path__[0]}/data/mistral_instruct_tokenizer_240323.model.v3",
        copy / "tokenizer.model.v3",
    )
    return copy


@pytest.fixture(params=["tekken", "sentencepiece", "hugging_face"])
def tokenizer(request, copy, hugging_face_folder):
    path = {
        "tekken": lambda: copy,
        "sentencepiece": lambda: sentencepiece_folder(copy),
        "hugging_face": lambda: hugging_face_folder,
    }[request.param]()
    return load_model(path, last_layer=0, device="cpu").tokenizer


def test_text_survives_the_tokenizer_even_where_it_looks_like_special_tokens(tokenizer):
    ids = tokenizer.encode(TEXT)
    special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.chat(MESSAGES)[:2]}
    assert not special & set(ids)
    assert tokenizer.decode(ids) == TEXT


def test_the_bytes_of_the_pieces_join_to_the_text(tokenizer):
    joined = b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(TEXT))
    prefix = b" " if tokenizer.vocab_size == 32768 else b""  # sentencepiece puts a space before a text
    assert joined == prefix + TEXT.encode()
    assert tokenizer.token_bytes(tokenizer.bos_id) == b"<s>"
    with pytest.raises(ModelError, match="found token id"):
        tokenizer.token_bytes(tokenizer.vocab_size)


def test_the_strings_of_the_tokens_join_to_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    strings = tokenizer.strings(ids)
    assert len(strings) == len(ids)
    assert "".join(strings).removeprefix(" ") == TEXT.removeprefix(" ")


def test_a_chat_begins_with_bos_and_the_instruction_marker(tokenizer):
    ids = tokenizer.chat(MESSAGES)
    names = [tokenizer.token_bytes(id) for id in ids]
    assert names[:2] == [b"<s>", b"[INST]"]
    assert names[-1] == b"[/INST]"
    assert tokenizer.decode(ids).strip() == "hi"
    with pytest.raises(ModelError, match="does not take these messages"):
        tokenizer.chat([{"role": "nobody"}])


def test_a_conversation_that_an_assistant_ends_is_whole_and_no_prompt(tokenizer):
    reply = {"role": "assistant", "content": "hello"}
    ids = tokenizer.chat([*MESSAGES, reply])
    prompt = tokenizer.chat(MESSAGES)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]).strip() == "hello"
    assert ids[-1] == tokenizer.eos_id
    again = tokenizer.chat([*MESSAGES, reply, *MESSAGES])
    assert again[: len(ids)] == ids
    assert tokenizer.token_bytes(again[-1]) == b"[/INST]"


@pytest.mark.parametrize("engine", ["mistral-inference", "transformers"])
def test_the_head_beside_the_first_layers_gives_logits_of_vectors_but_of_no_text(mistral_folder, tokens_BT, engine):
    whole = load_model(mistral_folder, engine=engine)
    model = load_model(mistral_folder, engine=engine, last_layer=1, head=True)
    x_ND = torch.randn(3, 32)
    assert torch.equal(model.unembed(x_ND), whole.unembed(x_ND))
    assert torch.equal(model.residuals(tokens_BT, 1), whole.residuals(tokens_BT, 1))
    with pytest.raises(ModelError, match="last_layer=1: logits need the whole model"):
        model.forward(tokens_BT)


def test_a_gpu_that_cannot_be_used_is_told_by_the_warning_or_by_its_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(language_model, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_gpu() == ""
    (tmp_path / "version").touch()
    assert "cannot use the GPU: update its driver" in why_no_gpu()
    (tmp_path / "version").unlink()
    too_old = "CUDA initialization: The NVIDIA driver on your system is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(warnings.warn(too_old, stacklevel=1)))
    assert "cannot use the GPU: update its driver" in why_no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_gpu() is None


def test_a_cuda_device_is_named_as_its_tensors_name_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, index in (("cuda", 0), ("cuda:1", 1)):
        assert device_and_dtype(asked, "float32")[0] == torch.device("cuda", index)
