"""Files that say something wrong, reader by reader: one line that names the file, and nothing changed."""

import json
import struct
from pathlib import Path

import pytest

from mistral_sae.cli import UserError
from mistral_sae.explain import cache
from tools.fuzz import READERS

# ---- contents ----

NO_JSON = {
    "nothing": b"",
    "half of it": b'{"a": ',
    "words": b"nonsense",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "two values": b"{} {}",
    "bytes that are no UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(100),
    "lists without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "more than a description may have": b" " * 64_000_001,
}
WRONG_COUNTS = [None, True, "4", "x", 4.5, 0, -1, 2**31, 10**30, [4], {}]
NAN, INFINITE = float("nan"), float("inf")


def json_with(**fields):
    """An edit of a JSON object, the first of a file of lines."""

    def edit(content: bytes) -> bytes:
        first, *rest = content.split(b"\n{")
        return b"\n{".join([json.dumps(json.loads(first) | fields).encode(), *rest])

    return edit


def json_without(*names):
    def edit(content: bytes) -> bytes:
        first, *rest = content.split(b"\n{")
        fields = {name: value for name, value in json.loads(first).items() if name not in names}
        return b"\n{".join([json.dumps(fields).encode(), *rest])

    return edit


def header_with(size=None, **fields):
    """An edit of the first tensor of a safetensors file, or of its header's size."""

    def edit(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = next(name for name in header if name != "__metadata__")
        header[fields.pop("name", name)] = header.pop(name) | fields
        written = json.dumps(header).encode()
        return struct.pack("<Q", len(written) if size is None else size) + written + content[8 + length :]

    return edit


HEADERS = {
    "a shape of words": header_with(shape=["ab"]),
    "a negative shape": header_with(shape=[-1]),
    "another shape": header_with(shape=[3, 5, 7]),
    "a shape beyond all memory": header_with(shape=[2**40, 2**40]),
    "no shape": header_with(shape=None),
    "an unknown dtype": header_with(dtype="F99"),
    "a dtype of another size": header_with(dtype="F64"),
    "offsets that overlap": header_with(data_offsets=[1, 5]),
    "offsets backwards": header_with(data_offsets=[64, 0]),
    "offsets of words": header_with(data_offsets=["a", "b"]),
    "a header of all there is": header_with(size=2**63),
    "a header of nothing": header_with(size=0),
    "half a file": lambda content: content[: len(content) // 2],
    "an empty file": lambda content: b"",
    "a pointer of Git LFS": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "a header of lists without end": lambda content: struct.pack("<Q", 50_000) + b"[" * 50_000,
}


# Each case: reader, file, what is wrong, the edit


def no_json():
    for reader, file in (
        ("params.json and weights", "params.json"),
        ("config.json, index and weights", "config.json"),
        ("config.json, index and weights", "model.safetensors.index.json"),
        ("autoencoder", "cfg.json"),
        ("evaluation.json and metrics.jsonl", "evaluation.json"),
        ("analysis.json", "analysis.json"),
    ):
        for what, content in NO_JSON.items():
            yield reader, file, what, lambda _, content=content: content
    for reader, file in (
        ("completions.jsonl", "completions.jsonl"),
        ("explanations.jsonl", "explanations.jsonl"),
        ("evaluation.json and metrics.jsonl", "metrics.jsonl"),
    ):
        for what, content in NO_JSON.items():
            yield reader, file, what, lambda whole, content=content: content + b"\n" + whole


def damaged_headers():
    for reader, file in (
        ("params.json and weights", "consolidated.safetensors"),
        ("config.json, index and weights", "model-00001-of-00001.safetensors"),
        ("autoencoder", "sae_weights.safetensors"),
        ("autoencoder", "sparsity.safetensors"),
        ("state", "state.safetensors"),
    ):
        for what, edit in HEADERS.items():
            if (reader, what) != ("state", "another shape"):
                yield reader, file, what, edit


def wrong_fields():
    for reader, file, wrong in (
        ("params.json and weights", "params.json", PARAMS),
        ("config.json, index and weights", "config.json", CONFIG),
        ("config.json, index and weights", "model.safetensors.index.json", {"weight_map": [5, [], {"a": 3}, None]}),
        ("autoencoder", "cfg.json", CFG),
        ("completions.jsonl", "completions.jsonl", COMPLETION),
        ("explanations.jsonl", "explanations.jsonl", LABEL),
        ("evaluation.json and metrics.jsonl", "evaluation.json", {"l0": ["x", None, NAN, INFINITE, [1], {}, True]}),
        ("evaluation.json and metrics.jsonl", "metrics.jsonl", {"step": ["1", None, NAN, [1], 10**400, {}]}),
        ("analysis.json", "analysis.json", {"limits": [None, 1], "monosemantic": [None, [], {"sentence": "a"}]}),
    ):
        for name, values in wrong.items():
            for value in values:
                yield reader, file, f"{name} = {str(value)[:40]}", json_with(**{name: value})
    for reader, file, names in (
        ("params.json and weights", "params.json", ["dim", "n_layers", "norm_eps", "n_kv_heads"]),
        ("config.json, index and weights", "config.json", ["model_type"]),
        ("autoencoder", "cfg.json", ["architecture", "d_in", "d_sae", "k"]),
        ("completions.jsonl", "completions.jsonl", ["key", "status", "text", "prompt_tokens", "dollars"]),
        ("explanations.jsonl", "explanations.jsonl", ["feature", "explanation", "explainer", "status", "scores"]),
    ):
        for name in names:
            yield reader, file, f"no {name}", json_without(name)


PARAMS = {
    "n_layers": [*WRONG_COUNTS, 1001],
    "dim": WRONG_COUNTS,
    "head_dim": [3, "4"],
    "n_heads": [3, 0],
    "n_kv_heads": [3, 0],
    "norm_eps": ["x", NAN, INFINITE, -1, 2],
    "rope_theta": ["x", NAN, 0, -1, []],
    "sliding_window": ["x", -1, 2.5, ["x"], {}],
    "moe": [5, "x", {}, [], {"num_experts": "2"}, {"num_experts": 2, "num_experts_per_tok": 3}],
    "tied_embeddings": ["yes", 3],
    "model_type": ["mamba", 3, None],
    "yarn": [{"factor": 4}],
}
CONFIG = {
    "num_hidden_layers": ["4", 4.5, 0, -1, 1001, 10**9, [4]],
    "hidden_size": ["8", 0, 2**31, {}],
    "num_attention_heads": ["x", 0],
    "vocab_size": ["x", 0, -1, 10**30],
    "max_position_embeddings": ["x", 0, 1.5],
    "rms_norm_eps": ["x"],
    "model_type": [3, None, "gemma", ["llama"]],
    "quantization_config": [5, "x", []],
    "text_config": [5, "x", []],
}
CFG = {
    "d_in": [*WRONG_COUNTS, 5],
    "d_sae": [*WRONG_COUNTS, 5],
    "k": ["2", 0, -1, 9, 2.0, []],
    "architecture": [3, "gated", []],
    "normalize_activations": ["x", 3, []],
    "reshape_activations": ["hook_z", 3],
    "apply_b_dec_to_input": ["yes", 1],
    "metadata": [5, "x", [], {"hook_name": 3}, {"hook_layer": "1"}, {"model_name": []}, {"prepend_bos": 1}],
    "activation_fn_kwargs": [5, {"k": "2"}],
}
COMPLETION = {
    "key": [3, None, []],
    "status": ["fine", 3, None, []],
    "text": [3, None, [], {}],
    "prompt_tokens": ["10", 1.5, -1, 2**60, None, [10]],
    "completion_tokens": ["10", True],
    "dollars": ["x", NAN, INFINITE, -1, None, []],
}
LABEL = {
    "feature": ["3", -1, 2**40, 1.5, None],
    "explanation": [3, None, [], {}],
    "explainer": [3, None],
    "status": ["fine", 3, None],
    "scores": [
        3,
        [],
        {"detection": 3},
        {"detection": {"value": "x"}},
        {"detection": {"value": NAN}},
        {"detection": {}},
    ],
    "judgements": [3, {}, [3], [[]], [["detection"]], [["detection", "hard", "2", False, None]]],
    "reason": [3, []],
}
CASES = [*no_json(), *damaged_headers(), *wrong_fields()]


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    """The valid files of each reader."""
    found = {}
    for name in {reader for reader, *_ in CASES} | {"activations"}:
        folder = tmp_path_factory.mktemp("valid")
        READERS[name].write(folder)
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        READERS[name].read(folder)
    return found


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_there_are_hundreds_of_them():
    assert len(CASES) >= 350


@pytest.mark.parametrize(
    ("reader", "file", "what", "edit"), CASES, ids=[f"{file}: {what}" for _, file, what, _ in CASES]
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(tmp_path, valid, reader, file, what, edit):
    files = valid[reader] | {file: edit(valid[reader][file])}
    write(tmp_path, files)
    with pytest.raises(UserError) as error:
        READERS[reader].read(tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert file in line or str(tmp_path) in line
    assert "expected" in line or ": " in line
    assert len(line) < 1000
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


ARRAYS = {
    "a token of no document": ("documents", b"\x07"),
    "a run that begins beyond the end": ("first", b"\x63"),
    "a run that ends beyond the end": ("last", b"\x63"),
    "an activation beyond the end": ("positions", b"\x63"),
    "offsets that fall": ("offsets", b"\x03"),
    "a maximum that is no number": ("maxima", b"\x00\x7e"),
    "names that are no JSON": ("names", b"{"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_a_shard_whose_arrays_do_not_fit_each_other_is_made_again(tmp_path, valid, what):
    name, value = ARRAYS[what]
    content = valid["activations"]["00000.safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    at = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    write(tmp_path, valid["activations"] | {"00000.safetensors": content[:at] + value + content[at + len(value) :]})
    found, why = cache.open_cache(tmp_path, json.loads(valid["activations"]["manifest.json"])["made_from"])
    assert (found, why) == (None, f"the cache in {tmp_path} is damaged: made again from shard 0 on")


@pytest.mark.parametrize("what", [what for what in HEADERS if what != "another shape"])
def test_a_damaged_shard_is_made_again(tmp_path, valid, what):
    edited = HEADERS[what](valid["activations"]["00000.safetensors"])
    write(tmp_path, valid["activations"] | {"00000.safetensors": edited})
    found, why = cache.open_cache(tmp_path, json.loads(valid["activations"]["manifest.json"])["made_from"])
    assert found is None
    assert why.endswith("made again from shard 0 on")


@pytest.mark.parametrize("what", NO_JSON)
def test_a_damaged_manifest_is_a_cache_that_is_made_again(tmp_path, valid, what):
    write(tmp_path, valid["activations"] | {"manifest.json": NO_JSON[what]})
    found, why = cache.open_cache(tmp_path, {})
    assert (found, why) == (None, f"the cache in {tmp_path} is damaged: made again")
    assert cache.noted(tmp_path) is None
    assert cache.is_of(tmp_path, "whatever")
