"""Tokenizers of both layouts: the same ids, text that continues a prompt, and which tokens are special."""

import json
import shutil

import pytest
from small_models import PARAMS, random_weights, write_hugging_face_folder, write_mistral_folder

from mistral_sae.model.language_model import STANDIN, ModelError, load_model

TEXTS = (
    "don't we'll I'M 2024 12345",
    "raise FileNotFoundError(f'Directory does not exist: {dst}') from e",  # where 'D is no contraction
    "def größe(x):\n\treturn '日本 🎉' + x\r\n\r\n  # a/b/c //\n/",
    "HTTPServer camelCase XMLHttpRequest ÉCOLE école",
)


@pytest.fixture
def tekken_in_hugging_face(tmp_path):
    """The stand-in's tokenizer as transformers before 5 wrote it, with tiktoken's pattern in place of tekken's own."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.integrations.mistral.tokenizer import MistralConverter

    params = PARAMS | {"vocab_size": 100_100}  # transformers takes smaller ones for no tekken
    folder = write_hugging_face_folder(tmp_path / "hf", params, random_weights(params))
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer = MistralConverter(str(STANDIN / "tekken.json")).converted()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    written = json.loads((folder / "tokenizer.json").read_text())
    written["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = TikTokenConverter().pattern
    written["model"]["vocab"] |= {f"<unused {id}>": id for id in range(len(written["model"]["vocab"]), 100_100)}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.1"}))
    return folder


def test_both_layouts_give_the_same_ids_although_the_file_splits_text_otherwise(tekken_in_hugging_face, monkeypatch):
    from mistral_sae.model import tokenizer as module

    ours = load_model(STANDIN, last_layer=0, device="cpu").tokenizer
    theirs = load_model(tekken_in_hugging_face, last_layer=0, device="cpu").tokenizer
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
    monkeypatch.setattr(module, "_splits_otherwise", lambda path: False)
    wrong = load_model(tekken_in_hugging_face, last_layer=0, device="cpu").tokenizer
    assert any(wrong.encode(text) != ours.encode(text) for text in TEXTS)


def test_a_tokenizer_that_does_not_split_is_left_as_it_is(hugging_face_folder, tmp_path):
    """transformers would give a sentencepiece tokenizer, too, the pattern of tekken, which loses its spaces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(hugging_face_folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*token*"))
    letters = {piece: id for id, piece in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghij", "▁a", "▁b"])}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(letters, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.1"}))
    found = load_model(folder, last_layer=0, device="cpu").tokenizer
    assert found.encode("a b cab") == [letters[piece] for piece in ["▁a", "▁b", "▁", "c", "a", "b"]]
    assert found.decode(found.encode("a b cab")) == "a b cab"


def sentencepiece(tmp_path, version):
    import mistral_common

    names = {
        "v1": "tokenizer.model.v1",
        "v2": "mistral_instruct_tokenizer_240216.model.v2",
        "v3": "mistral_instruct_tokenizer_240323.model.v3",
    }
    sizes = {"v1": 32000, "v2": 32768, "v3": 32768}
    params = PARAMS | {"vocab_size": sizes[version]}
    folder = write_mistral_folder(tmp_path / version, params, random_weights(params))
    (folder / "tekken.json").unlink()
    shutil.copy(f"{mistral_common.__path__[0]}/data/{names[version]}", folder / f"tokenizer.model.{version}")
    return load_model(folder, last_layer=0, device="cpu").tokenizer


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "tekken"])
def test_text_that_continues_a_prompt_keeps_its_spaces_wherever_it_is_cut(tmp_path, version):
    if version == "tekken":
        tokenizer = load_model(None, last_layer=0, device="cpu").tokenizer
    else:
        tokenizer = sentencepiece(tmp_path, version)
    text = "The thing that I wanted to tell you is that  two spaces\n\nand lines are kept."
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        assert prompt + tokenizer.decode_continuation(ids[:cut], ids[cut:]) == text


@pytest.mark.parametrize("layout", ["mistral_folder", "hugging_face_folder"])
def test_special_ids_are_bos_eos_padding_and_what_is_named(request, layout):
    path = request.getfixturevalue(layout)
    tokenizer = load_model(path, last_layer=0, device="cpu").tokenizer
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(tokenizer.special_ids())
    assert len(tokenizer.special_ids()) == 2 + (tokenizer.pad_id not in (None, -1))
    more = set(tokenizer.special_ids(["[INST]", 77])) - set(tokenizer.special_ids())
    assert {tokenizer.token_bytes(id) for id in more} == {b"[INST]", tokenizer.token_bytes(77)}
    with pytest.raises(ModelError, match=r"no token '\[NONE\]': expected one such as"):
        tokenizer.special_ids(["[NONE]"])
    with pytest.raises(ModelError, match="found token id 9999"):
        load_model(path, last_layer=0, device="cpu", exclude_tokens=[9999])


def test_positions_of_special_tokens_are_not_kept(mistral_folder, tokens_BT):
    model = load_model(mistral_folder, last_layer=0, device="cpu", exclude_tokens=[77])
    tokens_BT[0, 3], tokens_BT[1, 4], tokens_BT[2, 5] = model.tokenizer.bos_id, model.tokenizer.eos_id, 77
    dropped = [[0, 3], [0, 4], [0, 5]]
    assert [row.logical_not().nonzero().flatten().tolist() for row in model.kept(tokens_BT)] == dropped
