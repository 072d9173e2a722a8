"""Residuals on disk: those of the model, each once, in an order that can be repeated; whatever is wrong is one line."""

import json
import re
import resource
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mistral_sae.cli import Failed, UserError
from mistral_sae.data import stored
from mistral_sae.data.activations import Batch, Stream, shuffled_batches
from mistral_sae.data.place import Place
from mistral_sae.data.stored import StoredResiduals, StoreError
from mistral_sae.data.tokens import Corpus, batches, shuffle
from mistral_sae.files import locked

T, SHARD, BLOCK = 9, 64, 8
SIZES = {"batch_size": 12, "buffer_tokens": 50}


class Numbers:
    """A tokenizer of texts that are numbers."""

    bos_id = 0

    def encode(self, text):
        return [int(number) for number in text.split()]

    def fingerprint(self):
        return "numbers"


class Echo:
    """A model whose residual tells its token and layer, exactly even in bfloat16."""

    device, dtype, d_model, tokenizer = torch.device("cpu"), torch.float32, 4, Numbers()

    def __init__(self, breaks_at=None):
        self.rows, self.breaks_at = 0, breaks_at

    def kept(self, tokens_RT):
        return tokens_RT != 0

    def residuals_by_layer(self, tokens_RT, layers):
        self.rows += len(tokens_RT)
        if self.breaks_at is not None and self.rows > self.breaks_at:
            raise KeyboardInterrupt
        parts = tokens_RT // 128, tokens_RT % 128, torch.ones_like(tokens_RT)
        return {layer: torch.stack([*parts, torch.full_like(tokens_RT, layer)], dim=-1).float() for layer in layers}

    def fingerprint(self, layer):
        return f"echo {layer}"

    def check_finite(self, numbers, what):
        if not numbers.isfinite().all():
            raise UserError(f"found NaN in the {what}")


def tokens_of(x):
    return (128 * x[:, 0].long() + x[:, 1].long()).tolist()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stored, "SHARD_TOKENS", SHARD)
    monkeypatch.setattr(stored, "BLOCK_TOKENS", BLOCK)


@pytest.fixture
def corpus(tmp_path):
    """Documents of 50 numbers, all different: 2,000 of them, of which some are held out."""
    path = tmp_path / "text.jsonl"
    texts = [" ".join(map(str, range(1 + 50 * i, 51 + 50 * i))) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(str(path), held_out_fraction=0.2, context_length=T)


@pytest.fixture
def store_of(tmp_path, corpus):
    def of(tokens=10 * SHARD, layers=(1,), corpus=corpus, **changed):
        constants = {
            "ACTIVATIONS_PATH": str(tmp_path / "kept"), "ACTIVATIONS_TOKENS": tokens, "SHUFFLE_ROWS": 20,
            "EXCLUDE_TOKENS": [],
        } | changed  # fmt: skip
        return StoredResiduals.of(SimpleNamespace(**constants), corpus, layers, 4, torch.float32)

    return of


@pytest.fixture
def full(store_of, corpus):
    store = store_of()
    store.fill(corpus, Echo(), 3)
    return store


def batches_of(store, count, layer=1, seed=0, **options):
    """The first batches (B, D) of one stream."""
    batches = islice(store.batches([Stream(layer, seed)], **SIZES | options), count)
    return [Batch(x_SBD[0], place) for x_SBD, place in batches]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


# ---- what is in it ----


def test_an_epoch_has_each_residual_of_the_model_once(full, corpus):
    rows = corpus.rows(Numbers(), held_out=False)
    options = {"batch_size": SHARD, "buffer_tokens": SHARD, "rows_per_forward": 7, "seed": 0}
    of_model = [x for x, _ in islice(shuffled_batches(shuffle(rows, 20, 0), Echo(), 1, **options), 10)]
    found = torch.cat([x for x, _ in batches_of(full, 10 * SHARD // 16, batch_size=16)])
    assert found.dtype == torch.bfloat16
    assert Counter(map(tuple, found.tolist())) == Counter(map(tuple, torch.cat(of_model).tolist()))
    assert max(Counter(tokens_of(found)).values()) == 1


def test_every_buffer_is_drawn_from_all_over_the_shards(full):
    shard_of = {}
    for number in range(10):
        x = torch.from_numpy(full._open(number, [1])[0][1].copy()).view(torch.bfloat16).view(-1, 4)
        shard_of |= dict.fromkeys(tokens_of(x), number)
    buffers = batches_of(full, 4, batch_size=160, buffer_tokens=160)
    assert all(len({shard_of[token] for token in tokens_of(x)}) > 6 for x, _ in buffers)


def test_the_residuals_are_those_of_a_language_model_in_bfloat16(tmp_path, mistral_folder, monkeypatch):
    from mistral_sae.model.language_model import load_model

    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) + "\n" for i in range(60)))
    corpus, model = Corpus(str(path), held_out_fraction=0.2, context_length=32), load_model(mistral_folder)
    store = StoredResiduals(tmp_path / "kept", model.d_model, [1], 8 * SHARD, 20, {})
    store.fill(corpus, model, 4)
    assert store.missing() == []
    rows = next(batches(corpus.rows(model.tokenizer, held_out=False), 60))
    of_model = model.residuals(rows, 1)[model.kept(rows)]
    found = torch.cat([x for x, _ in batches_of(store, 8 * SHARD // 16, batch_size=16)]).float()
    nearest, which = torch.cdist(found, of_model, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert (nearest / of_model[which].norm(dim=1)).max() < 2**-8  # half a unit of 8 bits


def test_datasets_opens_it(full):
    import datasets

    shard = datasets.Dataset.from_file(str(full.folder / "00003.arrow"))
    assert shard.features["layer_1"] == datasets.List(datasets.Value("int16"), length=4)
    x = shard.with_format("torch", dtype=torch.int16)[:]["layer_1"].view(torch.bfloat16)
    assert x.shape == (SHARD, 4)
    whole = datasets.load_dataset("arrow", data_files=str(full.folder / "*.arrow"), split="train", streaming=True)
    rows = torch.tensor([row["layer_1"] for row in whole], dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(rows[3 * SHARD : 4 * SHARD], x)
    epoch = batches_of(full, 10 * SHARD // 16, batch_size=16)
    assert sorted(tokens_of(rows)) == sorted(token for x, _ in epoch for token in tokens_of(x))


# ---- the order ----


def test_a_training_goes_on_exactly_after_any_of_its_batches(full):
    whole = batches_of(full, 130)  # two epochs and a half
    assert whole[-1].place.epoch == 2
    for step in [1, 4, 5, 13, 52, 53, 54, 77, 106, 107]:
        place = Place.of(json.loads(json.dumps(whole[step - 1].place._asdict())))
        rest = batches_of(full, 20, start=place)
        assert all(torch.equal(a.x, b.x) and a.place == b.place for a, b in zip(whole[step:], rest, strict=False))


def test_the_second_epoch_has_the_same_residuals_in_another_order(full):
    tokens = [token for x, _ in batches_of(full, 80, batch_size=16) for token in tokens_of(x)]
    first, second = tokens[: 10 * SHARD], tokens[10 * SHARD :]
    assert sorted(first) == sorted(second)
    assert first != second


def test_another_seed_has_another_order_of_the_same_files(full, corpus, store_of):
    before = contents(full.folder)
    store_of(corpus=replace(corpus, seed=1)).fill(replace(corpus, seed=1), Echo(breaks_at=0), 3)
    assert contents(full.folder) == before
    assert tokens_of(batches_of(full, 1, seed=1)[0].x) != tokens_of(batches_of(full, 1)[0].x)


def test_a_training_on_fewer_tokens_does_not_notice_that_there_are_more(full, store_of, corpus):
    few = store_of(tokens=3 * SHARD + 5)
    before, files = batches_of(few, 40), contents(full.folder)
    assert len({token for x, _ in before for token in tokens_of(x)}) == 3 * SHARD + BLOCK  # whole blocks
    more = store_of(tokens=12 * SHARD)
    model = Echo()
    more.fill(corpus, model, 3)
    assert model.rows <= 3 * SHARD / (T - 1) + 20  # what was there is not made again
    assert files.items() <= contents(full.folder).items()
    assert all(torch.equal(a.x, b.x) for a, b in zip(before, batches_of(few, 40), strict=True))


def test_no_more_than_one_buffer_is_read_ahead(full, monkeypatch):
    read = []
    blocks = StoredResiduals._blocks
    monkeypatch.setattr(StoredResiduals, "_blocks", lambda *args: read.append(1) or blocks(*args))
    batches = full.batches([Stream(1, 0)], batch_size=8, buffer_tokens=48)
    for number in range(1, 19):
        next(batches)
        time.sleep(0.01)  # for the thread to go as far as it may
        assert len(read) <= -(-number // 6) + 1
    batches.close()


# ---- several layers ----


def test_several_layers_are_of_the_same_tokens_and_each_is_as_it_would_be_alone(full, store_of, corpus, tmp_path):
    both, model = store_of(layers=[2, 1], ACTIVATIONS_PATH=str(tmp_path / "both")), Echo()
    both.fill(corpus, model, 3)
    assert model.rows < 10 * SHARD / (T - 2) + 20  # in one forward
    streams = [Stream(2, 0), Stream(1, 0), Stream(1, 5)]
    found = [x for x, _ in islice(both.batches(streams, **SIZES), 60)]
    for i, (layer, seed) in enumerate(streams):
        alone = batches_of(both, 60, layer=layer, seed=seed)
        assert all(torch.equal(x[i], batch.x) for x, batch in zip(found, alone, strict=True))
        assert all((batch.x[:, 3] == layer).all() for batch in alone)
    assert all(tokens_of(x[0]) == tokens_of(x[1]) != tokens_of(x[2]) for x in found)
    assert all(torch.equal(x[1], batch.x) for x, batch in zip(found, batches_of(full, 60), strict=True))

    assert store_of(layers=[2], ACTIVATIONS_PATH=str(tmp_path / "both")).missing() == []
    (tmp_path / "both/00001.arrow").unlink()
    with pytest.raises(StoreError, match=r"TARGET_LAYER \(\[1, 2\] there and not yet complete, \[2\] here\)"):
        store_of(layers=[2], ACTIVATIONS_PATH=str(tmp_path / "both"))


# ---- filling ----


@pytest.mark.parametrize("rows", [1, 7, 20, 41, 66])
def test_a_filling_that_was_cut_off_goes_on_and_ends_the_same(full, store_of, corpus, tmp_path, rows):
    cut = store_of(ACTIVATIONS_PATH=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        cut.fill(corpus, Echo(breaks_at=rows), 3)
    (tmp_path / "cut/00009.arrow.partial").mkdir()
    (tmp_path / "cut/00009.arrow.partial/00009.arrow").write_bytes(b"half of it")  # as kill -9 leaves it
    left, model = len(cut.missing()), Echo()
    cut.fill(corpus, model, 3)
    assert contents(full.folder) == contents(cut.folder)
    assert model.rows <= (left + 1) * SHARD / (T - 1) + 20


def test_a_shard_that_was_removed_is_written_again_and_no_other(full, corpus):
    before = contents(full.folder)
    for number in (0, 4, 5):
        (full.folder / f"0000{number}.arrow").unlink()
    with pytest.raises(StoreError, match=r"found no .*0000\d.arrow, expected a shard of residuals: start again"):
        batches_of(full, 50)
    model = Echo()
    full.fill(corpus, model, 3)
    assert contents(full.folder) == before
    assert model.rows < 60  # of 80 and more


def test_a_full_disk_is_one_line_and_what_was_written_stays(store_of, corpus, tmp_path):
    store = store_of()
    with pytest.raises(KeyboardInterrupt):
        store.fill(corpus, Echo(breaks_at=40), 3)
    before, limits = contents(store.folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(Failed, match=r"could not write .*arrow \(File too large\)") as raised:
            store.fill(corpus, Echo(), 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert contents(store.folder) == before
    store.fill(corpus, Echo(), 3)
    assert store.missing() == []


def test_two_processes_do_not_fill_one_folder(store_of, corpus):
    store = store_of()
    with locked(store.folder), pytest.raises(UserError, match=r"another run at work.*set another ACTIVATIONS_PATH"):
        store.fill(corpus, Echo(), 3)


def test_residuals_that_are_not_finite_are_not_kept(store_of, corpus):
    model, store = Echo(), store_of()
    run = model.residuals_by_layer
    model.residuals_by_layer = lambda tokens, layers: {1: run(tokens, layers)[1] * torch.nan}
    with pytest.raises(UserError, match="found NaN in the residuals of layer 1"):
        store.fill(corpus, model, 3)
    assert len(store.missing()) == 10


# ---- the plan ----


def test_the_plan_says_how_much_is_to_be_written(store_of, corpus):
    plan = store_of().plan()
    assert "640 residuals of layer 1 in " in plan
    assert "5.1 kB to write, of " in plan
    store_of(tokens=SHARD).fill(corpus, Echo(), 3)
    assert "4.6 kB to write" in store_of().plan()
    assert store_of(tokens=SHARD).plan().endswith("all there")


def test_a_disk_without_room_is_refused(store_of, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5000))
    with pytest.raises(UserError, match=r"found 5.0 kB free .* expected 5.1 kB .* lower ACTIVATIONS_TOKENS"):
        store_of().plan()


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"EXCLUDE_TOKENS": [7]}, r"another EXCLUDE_TOKENS \(\[\] there, \[7\] here\)"),
        ({"layers": [2]}, r"another TARGET_LAYER \(\[1\] there, \[2\] here\)"),
    ],
)
def test_other_residuals_are_refused_in_one_line(full, store_of, changed, said):
    with pytest.raises(StoreError, match=said) as raised:
        store_of(**changed)
    assert "choose another ACTIVATIONS_PATH" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_texts_are_refused(full, store_of, corpus, tmp_path):
    with pytest.raises(StoreError, match=r"another CONTEXT_LENGTH \(9 there, 8 here\)"):
        store_of(corpus=replace(corpus, context_length=8))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "1 2 3"}))
    with pytest.raises(StoreError, match="residuals of another text of DATA_PATH, expected"):
        store_of()


def test_another_model_or_tokenizer_is_refused(full, corpus):
    for name, said in (("fingerprint", "model to layer 1"), ("tokenizer", "tokenizer")):
        model = Echo()
        setattr(model, name, SimpleNamespace(fingerprint=lambda: "x") if name == "tokenizer" else lambda layer: "x")
        with pytest.raises(StoreError, match=f"residuals of another {said}"):
            full.fill(corpus, model, 3)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 1}', b"\xff"])
def test_a_manifest_that_is_none_is_one_line(full, store_of, content):
    (full.folder / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"in .*manifest.json, expected .*: choose another ACTIVATIONS_PATH"):
        store_of()


def test_arrow_files_of_others_are_left_alone(full, store_of):
    (full.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"found Arrow files without a manifest.json"):
        store_of()


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_shard_is_one_line_or_no_harm(full, seed):
    whole = batches_of(full, 53)
    path, random = full.folder / "00002.arrow", torch.Generator().manual_seed(seed)
    content = bytearray(path.read_bytes())
    at = int(torch.randint(len(content), (1,), generator=random))
    if seed % 4 == 0:
        del content[at:]
    else:
        content[at] ^= 1 << seed % 8
    path.write_bytes(content)
    said = ""
    try:
        found = batches_of(full, 53)
    except StoreError as error:
        said = str(error)
    if said:
        assert re.fullmatch(r".*00002\.arrow.*", said)  # of one line
    else:
        assert all(torch.equal(a.x, b.x) for a, b in zip(whole, found, strict=True))


def test_a_bit_of_a_residual_that_changed_is_found(full):
    path = full.folder / "00002.arrow"
    content = path.read_bytes()
    bits = full._open(2, [1])[0][1].tobytes()
    at = content.index(bits) + 100
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(StoreError, match=r"found a damaged .*00002.arrow \(another checksum\).* remove it"):
        batches_of(full, 53)
