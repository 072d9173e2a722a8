"""demo.py from end to end, on a small random model; in a process of its own where signals and streams matter."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from test_steering import LAYER, D, F, autoencoder

from mistral_sae.explain.labels import write_labels
from mistral_sae.explain.types import Concept, Label
from mistral_sae.model.language_model import STANDIN, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, hash_of_sae, load_sae, save_sae
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import effect, search, sweep
from mistral_sae.steer.display import BARS, level_of
from mistral_sae.steer.steering import Edit, Subject, steer

ROOT = Path(__file__).parent.parent.parent
PROMPT = "def f(x):"
SETTINGS = {
    "DEVICE": "cpu",
    "CONTEXT_LENGTH": 32,
    "HELD_OUT_FRACTION": 0.3,
    "EVALUATION_STRIDE": 1,
    "ROWS_PER_FORWARD": 4,
    "FEATURE_INDEX": 3,
    "COEFFICIENT": 4.0,
    "PROMPT": PROMPT,
    "NEW_TOKENS": 12,
    "SWEEP_SAMPLES": 2,
    "SWEEP_COEFFICIENTS": "(0.5, 2.0, 8.0)",
}
METADATA = Metadata("tiny", f"blocks.{LAYER}.hook_resid_post", LAYER, True, 32, "text")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def columns(self) -> list[str]:
        """The texts of the two columns, without what marks them."""
        lines = [line for line in self.out.splitlines() if "│" in line][1:]
        lines = [line for line in lines if not re.fullmatch(r"[ ▁▃▅▇│]*[▁▃▅▇][ ▁▃▅▇│]*", line)]
        return ["".join(line.split("│")[i].strip() for line in lines).replace(" ", "") for i in (0, 1)]

    @property
    def steered_bars(self) -> str:
        """What marks the second column."""
        bars = [line for line in self.out.splitlines() if re.fullmatch(r"[ ▁▃▅▇│]*[▁▃▅▇][ ▁▃▅▇│]*", line)]
        return "\n".join(line.partition("│")[2] for line in bars)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    documents = [f"def f{i}(x):\n    raise Exception({i})\n\n\nimport os\nerror = f{i}({i})\n" * 3 for i in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def run_dir(tmp_path):
    """What train.py leaves, as far as demo.py needs it."""
    density = torch.full((F,), 0.003)
    save_sae(tmp_path / "run" / "sae", autoencoder(), METADATA, Statistics(torch.linspace(1, 5, F), density, None))
    return tmp_path / "run"


@pytest.fixture
def arguments(mistral_folder, corpus, run_dir):
    def of(**changed):
        constants = {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": run_dir}
        return [f"{name}={value}" for name, value in (constants | SETTINGS | changed).items()]

    return of


@pytest.fixture
def demo(run_script, arguments, monkeypatch):
    """Run demo.py in this process, with constants."""
    monkeypatch.setenv("COLUMNS", "100")
    return lambda **changed: Ran(*run_script("demo.py", arguments(**changed)))


def without_spaces(model, ids) -> str:
    text = "".join(model.tokenizer.strings(ids))
    return "".join(c if c.isprintable() else "·" for c in text.replace("\n", "")).replace(" ", "")


# ---- side by side ----


def test_the_models_own_text_stands_beside_the_steered_one(demo, mistral_folder, run_dir):
    ran = demo(TEMPERATURE=0.0)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"demo: {mistral_folder}")
    for words in (
        "engine    mistral-inference",
        "layer     1 of 0 to 2 (blocks.1.hook_resid_post)",
        "features  64 of ",
        "on 0.300% of tokens, at most 1.2",
    ):
        assert words in ran.out
    for name in ("feature 3", "raises when steered", "lowers when steered", "no explanation (explain.py writes them)"):
        assert name in ran.out
    assert "clamp: 3 set to 4 times its maximum (4.8)\n" in ran.out
    assert "\x1b" not in ran.out

    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)]
    plain = list(model.generate(ids, 12))
    with steer(model, loaded, {3: 4 * loaded.maximum_F[3]}):
        steered = list(model.generate(ids, 12))
    assert plain != steered
    assert ran.columns == [without_spaces(model, plain), without_spaces(model, steered)]


@pytest.mark.parametrize("changed", [{"STEERING_ON": False}, {"FEATURE_INDEX": "{3: None}"}])
def test_without_steering_both_columns_are_the_models_own(demo, changed):
    ran = demo(**changed)
    assert ran.code == 0, ran.err
    assert ran.columns[0] == ran.columns[1] != ""
    figures = re.findall(r"^with(?:out)? steering +(\d.*)$", ran.out, re.M)
    assert len(figures) == 2
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"METHOD": "add", "COEFFICIENT": -2}, "add: 3 added at -2 times the residual's norm"),
        ({"METHOD": "raw", "COEFFICIENT": 30}, "raw: 3 added at 30 times its decoder row"),
        ({"METHOD": "ablate"}, "ablate: 3 set to 0"),
        ({"POSITIONS": "generated"}, "on generated tokens"),
        ({"EXACT": 1}, "clamp: 3 set to 4 times"),
        ({"FEATURE_INDEX": "{3: 4, 40: -2.5}"}, "3 set to 4 times its maximum (4.8), 40 set to -2.5 times"),
        ({"COEFFICIENT": -4}, "3 set to -4 times its maximum (-4.8)"),
    ],
)
def test_methods_positions_and_several_features(demo, changed, words):
    ran = demo(**changed)
    assert ran.code == 0, ran.err
    assert words in ran.out
    if changed.get("METHOD") != "ablate":
        assert ran.columns[0] != ran.columns[1]


def test_only_generated_tokens_are_steered_where_that_is_asked(demo):
    everywhere, generated = demo(TEMPERATURE=0.0), demo(TEMPERATURE=0.0, POSITIONS="generated")
    assert everywhere.columns[0] == generated.columns[0]
    assert everywhere.columns[1] != generated.columns[1]


def test_the_marks_are_where_the_unsteered_model_finds_the_feature(demo, mistral_folder, run_dir):
    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)]
    with steer(model, loaded, {3: 4 * loaded.maximum_F[3]}):
        text = list(model.generate(ids, 12))
        edited = loaded.sae.encode(model.residuals(torch.tensor([ids + text]), LAYER)[0, len(ids) :])
    encoded = loaded.sae.encode(model.residuals(torch.tensor([ids + text]), LAYER)[0, len(ids) :])
    shares, under_the_edit = (each.dense(F)[:, 3] / loaded.maximum_F[3] for each in (encoded, edited))
    assert 0 < (shares > 0).sum() < 12
    assert (under_the_edit > 0).sum() != (shares > 0).sum()
    ran = demo(TEMPERATURE=0.0)
    strings = model.tokenizer.strings(ids + text)[len(ids) :]
    pairs = zip(strings, shares.tolist(), strict=True)
    expected = "".join(BARS[level_of(share)] * len(string) for string, share in pairs if share > 0)
    assert "".join(re.findall("[▁▃▅▇]", ran.steered_bars)) == expected
    (rate,) = re.findall(r"^with steering .* fires on (\d+)%", ran.out, re.M)
    assert int(rate) == round(100 * (shares > 0).float().mean().item())


def test_exact_encodes_all_features(demo, mistral_folder, run_dir):
    sae = load_sae(run_dir).sae
    sae.b_enc.data[3] = 0.5  # in itself active, and silent wherever TopK has stronger ones
    save_sae(run_dir / "sae", sae, METADATA, Statistics(torch.linspace(1, 5, F), torch.full((F,), 0.003), None))
    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)]
    texts = {}
    for exact in (False, True):
        with steer(model, loaded, {3: 2 * loaded.maximum_F[3]}, exact=exact):
            texts[exact] = list(model.generate(ids, 12))
    assert texts[False] != texts[True]
    for exact, text in texts.items():
        assert demo(TEMPERATURE=0.0, COEFFICIENT=2.0, EXACT=exact).columns[1] == without_spaces(model, text)


def test_the_tokens_that_the_feature_fires_on_are_marked(demo, monkeypatch, run_dir):
    sae = load_sae(run_dir).sae
    sae.b_enc.data[3] = 50.0  # on every token
    save_sae(run_dir / "sae", sae, METADATA, Statistics(torch.full((F,), 50.0), torch.full((F,), 0.003), None))
    ran = demo()
    assert "▇▇" in ran.out
    assert "fires on 100%" in ran.out
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = demo()
    assert "\x1b[4;" in coloured.out
    assert "▇▇" not in coloured.out


def test_a_prompt_of_nothing_is_continued_too(demo):
    assert demo(PROMPT="", NEW_TOKENS=1).code == 0


# ---- which feature ----


def test_words_find_a_feature_by_its_tokens_while_there_are_no_explanations(demo, run_dir):
    ran = demo(FEATURE_INDEX="exception")
    assert ran.code == 0, ran.err
    assert "no explanations of it (explain.py writes them)" in ran.out
    (chosen,) = re.findall(r"^  → +(\d+) ", ran.out, re.M)
    assert len(re.findall(r"^  [→ ] +\d+ +0\.0 .*no explanation$", ran.out, re.M)) > 1
    assert f"feature {chosen} " in ran.out


def explain(run_dir, **explanations):
    lines = [
        {"feature": int(f[1:]), "explanation": text, "explainer": "offline", "status": "ok", "scores": {}}
        for f, text in explanations.items()
    ]
    (run_dir / "explanations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_words_find_a_feature_by_its_explanation(demo, run_dir):
    explain(run_dir, f7="brackets", f9="an exception raised", f11="exceptions")
    ran = demo(FEATURE_INDEX="raised exception")
    assert ran.code == 0, ran.err
    assert "2 of 3 explanations match" in ran.out
    listed = dict(re.findall(r"^  [→ ] +(\d+) +(\d\.\d) ", ran.out, re.M))
    assert float(listed["9"]) > float(listed["11"]) > 0
    assert {label for feature, label in listed.items() if feature not in ("9", "11")} == {"0.0"}
    assert re.search(r"^  [→ ] +9 .*an exception raised$", ran.out, re.M)
    unmatched = demo(FEATURE_INDEX="import")
    assert "0 of 3 explanations match" in unmatched.out
    assert unmatched.code == 0, unmatched.err


def test_explanations_of_another_autoencoder_are_not_used(demo, run_dir):
    explain(run_dir, f3="brackets")
    assert "brackets" in demo().out  # nothing says whose they are
    for sae, is_own in ((load_sae(run_dir).sae, True), (autoencoder(seed=1), False)):
        (run_dir / "activations").mkdir(exist_ok=True)
        manifest = {"made_from": {"autoencoder": hash_of_sae(sae)}}
        (run_dir / "activations/manifest.json").write_text(json.dumps(manifest))
        ran = demo()
        assert ("brackets" in ran.out) == is_own
        assert ("are of another autoencoder: not used" in ran.out) != is_own


def test_without_a_feature_one_that_shows_is_taken_of_the_explained_if_there_are_any(demo, run_dir, monkeypatch):
    ran = demo(FEATURE_INDEX=None)
    assert ran.code == 0, ran.err
    assert len(re.findall(r"^  [→ ] +\d+ +\d+% → +\d+% +\d+% → +\d+% ", ran.out, re.M)) == search.FINALISTS
    explain(run_dir, f7="brackets")
    monkeypatch.setattr(effect.Effect, "is_visible", True)  # random weights show nothing
    ran = demo(FEATURE_INDEX=None)
    assert re.findall(r"^  [→ ] +(\d+) ", ran.out, re.M) == ["7"]
    assert "brackets (offline)" in ran.out


def test_a_feature_that_stands_for_a_concept_is_taken_first_and_the_text_is_counted(demo, run_dir, monkeypatch):
    monkeypatch.setattr(effect, "VISIBLE", -1.0)
    monkeypatch.setattr(sweep, "MOST_NATS", 99.0)
    concept = Concept("keyword", 0.75, 24.0, 0.4)
    write_labels(run_dir / "explanations.jsonl", [Label(7, "keywords", "offline", "ok", {}, concept=concept)])
    ran = demo(FEATURE_INDEX=None)
    assert ran.code == 0, ran.err
    assert "choosing a feature: of 1 that stand for a concept, numbers 1 to 1 are tried" in ran.out
    assert re.search(r"^keywords: \d+% → \d+% of the tokens, read as Python$", ran.out, re.M)


@pytest.mark.parametrize("method", ["clamp", "add", "raw"])
def test_without_a_coefficient_it_is_found_and_the_line_says_how(demo, method):
    ran = demo(COEFFICIENT=None, METHOD=method)
    assert ran.code == 0, ran.err
    found = re.findall(r"^coefficient: (\S+) of 0.5, 2, 8: the (?:strongest|weakest)", ran.out, re.M)
    assert found[0] in ("0.5", "2", "8")
    assert re.search(rf"^edit .* {found[0]} times its|^edit .* {found[0]} times the", ran.out, re.M)
    # Where it is looked for the texts are begun; how a seed's texts go on is the same
    given = demo(COEFFICIENT=found[0], METHOD=method)
    varies = r"^coefficient: .*\n|of [\d.]+ .B free$"
    assert re.sub(varies, "", given.out, flags=re.M) == re.sub(varies, "", ran.out, flags=re.M)
    by_size = demo(COEFFICIENT=None, METHOD=method, SWEEP_COEFFICIENTS=None)
    assert len(re.search(r"^coefficient: .* of (.*): the", by_size.out, re.M)[1].split(", ")) == len(effect.SIZES)


@pytest.mark.parametrize(("density", "of"), [(0.5, "features"), (0.003, "features that fire now and then")])
def test_without_an_explained_feature_that_fires_now_and_then_others_are_taken(demo, run_dir, density, of):
    explain(run_dir, f7="brackets")
    densities = torch.full((F,), density)
    densities[7] = 0.5
    save_sae(run_dir / "sae", autoencoder(), METADATA, Statistics(torch.linspace(1, 5, F), densities, None))
    ran = demo(FEATURE_INDEX=None)
    assert ran.code == 0, ran.err
    assert re.search(rf"of \d+ {of}, by the words", ran.out)
    swept = demo(FEATURE_INDEX=3, SWEEP=1)
    assert swept.code == 0, swept.err
    assert ("control: at random" in swept.out) == (density == 0.003)


@pytest.mark.parametrize("words", ["True", "None"])
def test_words_of_python_are_words_too(demo, run_dir, words):
    explain(run_dir, f7="brackets", f9=f"the word {words}")
    assert re.findall(r"^  → +(\d+) ", demo(FEATURE_INDEX=f"'{words}'").out, re.M) == ["9"]


# ---- the autoencoder and the model ----


def test_an_autoencoder_without_maxima_is_measured_once(demo, run_dir, tmp_path):
    save_sae(tmp_path / "other", autoencoder(), METADATA)
    first = demo(SAE_PATH=tmp_path / "other")
    assert first.code == 0, first.err
    assert "without its features' maxima" in first.out
    before = (run_dir / "feature_statistics.safetensors").stat().st_mtime_ns
    again = demo(SAE_PATH=tmp_path / "other")
    assert (run_dir / "feature_statistics.safetensors").stat().st_mtime_ns == before
    assert again.columns == first.columns


def test_the_label_of_another_model_is_a_warning(demo, run_dir):
    assert "warning" not in demo().out.replace("warning: the autoencoder explains", "")
    metadata = METADATA._replace(model_name="other/model")
    save_sae(run_dir / "sae", autoencoder(), metadata, Statistics(torch.rand(F), torch.rand(F), None))
    ran = demo()
    assert ran.code == 0
    assert "warning: the autoencoder was trained on other/model, by its label, and the model is tiny" in ran.out


def test_residuals_that_the_autoencoder_does_not_explain_are_a_warning(demo):
    assert re.search(r"warning: the autoencoder explains -?\d+% of the residuals' variance", demo().out)


def write_2024(folder: Path) -> Path:
    """The form of the published layer-16 autoencoder, whose label names another hook than it was trained on."""
    cfg = {
        "architecture": "standard",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 6},
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "hook_name": f"blocks.{LAYER}.hook_mlp_out",
        "hook_layer": LAYER,
        "model_name": "tiny",
        "normalize_activations": "layer_norm",
    }
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {name: p.detach().contiguous() for name, p in autoencoder().named_parameters()}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def test_the_form_of_2024_with_a_wrong_label_works_once_the_hook_is_given(demo, tmp_path):
    path = write_2024(tmp_path / "published")
    refused = demo(SAE_PATH=path)
    assert refused.code == 2
    assert "blocks.1.hook_mlp_out" in refused.err
    assert "hook_name" in refused.err
    ran = demo(SAE_PATH=path, HOOK_NAME="blocks.1.hook_resid_post")
    assert ran.code == 0, ran.err
    assert ran.columns[0] != ran.columns[1]


def test_both_kinds_of_model_folder_give_the_same_texts(demo, mistral_folder, hugging_face_folder, tmp_path):
    folder = shutil.copytree(hugging_face_folder, tmp_path / "tiny")
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.copy(STANDIN / "tekken.json", folder)
    ran = demo(MISTRAL_MODEL_PATH=folder, TEMPERATURE=0.0)
    assert ran.code == 0, ran.err
    assert ran.columns == demo(TEMPERATURE=0.0).columns


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RUN_DIR": "nowhere"}, "found no autoencoder in nowhere/sae: run train.py first, or set SAE_PATH"),
        ({"FEATURE_INDEX": 64}, "feature 64: expected a whole number from 0 to 63"),
        ({"FEATURE_INDEX": -1}, "feature -1"),
        ({"FEATURE_INDEX": "{3: 1, 99: 1}"}, "feature 99"),
        ({"FEATURE_INDEX": "{3: 'x'}"}, "coefficient 'x' of feature 3"),
        ({"FEATURE_INDEX": "{3: }"}, "expected a number, words or several as {12: 2, 40: -1}"),
        ({"FEATURE_INDEX": "{}"}, "no feature in FEATURE_INDEX"),
        ({"FEATURE_INDEX": "xylophone"}, "no feature for 'xylophone'"),
        ({"METHOD": "clmp"}, "METHOD is 'clmp': expected clamp, add, ablate or raw"),
        ({"POSITIONS": "prompt"}, "POSITIONS is 'prompt'"),
        ({"NEW_TOKENS": 0}, "NEW_TOKENS is 0"),
        ({"COEFFICIENT": "much"}, "COEFFICIENT must be of type float"),
        ({"SWEEP": 1, "METHOD": "ablate"}, "SWEEP is True: expected False with METHOD=ablate"),
        ({"SWEEP": 1, "STEERING_ON": False}, "SWEEP is True: expected False with STEERING_ON=False"),
        ({"SWEEP": 1, "FEATURE_INDEX": "{3: None}"}, "SWEEP over {3: None}, where nothing has a sign: expected"),
        ({"SWEEP": 1, "FEATURE_INDEX": 3, "COEFFICIENT": 0}, "SWEEP over {3: 0.0}, where nothing has a sign"),
        ({"SWEEP_COEFFICIENTS": "(1, 'a')"}, "SWEEP_COEFFICIENTS is (1, 'a'): expected numbers"),
        ({"FEATURE_INDEX": "[3, 40]"}, "found FEATURE_INDEX '[3, 40]': expected a number, words or several"),
        ({"FEATURE_INDEX": 4.5}, "found FEATURE_INDEX '4.5'"),
        ({"FEATURE_INDEX": "{[1]: 2}"}, "found FEATURE_INDEX '{[1]: 2}'"),
        ({"COEFFICIENTS": 1}, "the closest is COEFFICIENT"),
    ],
)
def test_a_mistake_is_one_line(demo, changed, words):
    ran = demo(**changed)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert words in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_an_autoencoder_of_another_width_or_a_deeper_model_is_one_line(demo, run_dir):
    wide = SparseAutoencoder(16, 32, 4)
    wide.initialize(torch.randn(9, 16), 0)
    save_sae(run_dir / "sae", wide, METADATA)
    ran = demo()
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "autoencoder of width 16 and layer 1, and tiny of width 32" in ran.err
    save_sae(run_dir / "sae", autoencoder(), METADATA._replace(hook_name="blocks.7.hook_resid_post", hook_layer=7))
    ran = demo()
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "layer 7, and tiny of width 32 and layers 0 to 2" in ran.err


# ---- the table ----


def test_the_sweep_has_a_table_and_texts_for_the_feature_and_for_each_control(demo, mistral_folder, run_dir):
    ran = demo(SWEEP=1)
    assert ran.code == 0, ran.err
    for title in ("feature 3", "control: random direction", "control: at random, feature"):
        assert re.search(rf"^{title}", ran.out, re.M)
    assert re.findall(r"^→? +(none|0\.5|2|8) ", ran.out, re.M) == ["none", "0.5", "2", "8"] * 3
    divergences = [float(kl) for kl in re.findall(r"^→? +(?:0\.5|2|8) +[\d.]+ +([\d.]+)", ran.out, re.M)]
    assert divergences[0] < divergences[1] < divergences[2]
    assert "strongest setting" in ran.out
    assert ran.out.count("→") >= 2
    assert re.findall(r"^[→ ] (none|0\.5|2|8)$", ran.out, re.M) == ["none", "0.5", "2", "8"] * 3
    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    ids = model.encode(PROMPT)
    with steer(model, loaded, {3: 8 * loaded.maximum_F[3]}):
        text = list(model.generate(ids, 12, 0.7))
    assert without_spaces(model, text) in "".join(ran.out.split())


@pytest.mark.parametrize("of", [{3: 1.0}, {3: -1.0}, {3: 1.0, 40: -2.0}])
def test_each_table_of_a_sweep_is_what_its_edit_does(demo, mistral_folder, run_dir, of):
    ran = demo(SWEEP=1, FEATURE_INDEX=of if len(of) > 1 else 3, COEFFICIENT=of[3], TEMPERATURE=0.0)
    assert ran.code == 0, ran.err
    found = re.findall(r"^→? +(?:0\.5|2|8) +([\d.]+) +([\d.]+)", ran.out, re.M)
    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    statistics = loaded.statistics
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(PROMPT)]
    _, (_, _, directions), (_, others, _) = sweep.with_controls(Subject(model, loaded, statistics, {}), Edit(of), 0)
    expected = []
    for signs, along in ((of, None), (of, directions), (others.coefficients, None)):
        for scale in (0.5, 2.0, 8.0):
            clamped = {f: scale * c * float(loaded.maximum_F[f]) for f, c in signs.items()}
            with steer(model, loaded, clamped, directions_SD=along):
                text = list(model.generate(ids, 12))
            edit = steer(model, loaded, clamped, directions_SD=along)
            (figures,) = sweep.measure(model, loaded, list(of), ids, [text], edit)
            expected.append((f"{figures.cross_entropy:.2f}", f"{figures.kl:.2f}"))
    assert found == expected
    assert len({*expected[:3]} & {*expected[3:6]} & {*expected[6:]}) == 0


# ---- conversation ----


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_a_reply_and_not_the_conversation(arguments, run_dir):
    environment = {name: value for name, value in os.environ.items() if name != "MISTRAL_MODEL_PATH"}
    process = subprocess.Popen(
        [sys.executable, "demo.py", *arguments(CHAT=1, NEW_TOKENS=30_000, CHAT_CONTEXT=40_000)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(60, process.kill)  # or a failure would wait for output that never comes
    watchdog.start()
    try:
        for line in (b"def f(x):\n", b"more\n"):
            read_until(process, b"you> ")
            process.stdin.write(line)
            process.stdin.flush()
            read_until(process, b" ", at_least=20)  # of the reply
            process.send_signal(signal.SIGINT)
            read_until(process, b"(stopped)")
        out, err = process.communicate(b"/coefficient 2\n/quit\n", timeout=30)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert b"3 set to 2 times its maximum" in out
    assert b"Traceback" not in err
    turns = [json.loads(line) for line in (run_dir / "chat.jsonl").read_text().splitlines()]
    assert [(turn["user"], turn["stopped"]) for turn in turns] == [("def f(x):", True), ("more", True)]
    assert all(turn["reply"] for turn in turns)


def read_until(process, words: bytes, at_least: int = 0) -> bytes:
    """Read what is printed up to some words."""
    seen = b""
    while words not in seen or len(seen) < at_least:
        byte = process.stdout.read(1)
        assert byte, seen + process.stderr.read()
        seen += byte
    return seen


def test_a_conversation_is_steered_finds_features_and_ends_with_its_input(demo, monkeypatch, mistral_folder, run_dir):
    lines = iter(["def f", "/feature exception", "def f", "/off", "def f"])

    def read(prompt):
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    ran = demo(CHAT=1, TEMPERATURE=0.0)
    assert ran.code == 0, ran.err
    assert "features for 'exception'" in ran.out
    assert "no instruct model" not in ran.out  # its tokenizer has a chat format
    turns = [json.loads(line) for line in (run_dir / "chat.jsonl").read_text().splitlines()]
    first, found, off = turns
    assert first["features"] == {"3": 4.0} != found["features"] == off["features"]
    assert [turn["on"] for turn in turns] == [True, True, False]

    model, loaded = load_model(mistral_folder, device="cpu"), load_sae(run_dir)
    ids = model.tokenizer.chat([{"role": "user", "content": "def f"}])
    plain = model.tokenizer.decode(list(model.generate(ids, 12)))
    with steer(model, loaded, {3: 4 * loaded.maximum_F[3]}):
        steered = model.tokenizer.decode(list(model.generate(ids, 12)))
    assert first["reply"].strip() == steered.strip() != plain.strip()
