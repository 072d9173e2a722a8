"""explain.py from end to end: an offline run, what earlier runs spare it, which features, settings that are refused."""

import json
import re
import shutil

import pytest
from explain_runs import CHOSEN, FEATURES, assert_refused, contents_of, labels_of, openai, reply, write_sae
from openai_server import Server
from safetensors.torch import load_file
from small_models import PARAMS, random_weights, write_hugging_face_folder

from mistral_sae.analysis import naming
from mistral_sae.analysis.concepts import IN_WORDS
from mistral_sae.files import locked
from mistral_sae.model.language_model import LanguageModel

# ---- offline ----


def test_an_offline_run_writes_a_label_of_each_selected_feature_and_the_report(finished):
    run_dir, ran = finished
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in (run_dir / "explanations.jsonl").read_text().splitlines()]
    assert [record["feature"] for record in records] == CHOSEN
    for record in records:
        assert {"feature", "explanation", "explainer", "scores", "status", "judgements"} <= set(record)
        assert record["explainer"] == "offline"
        assert record["status"] in ("ok", "no pattern", "dead")
        assert bool(record["explanation"]) == (record["status"] == "ok")
    scored = [record["scores"]["detection"] for record in records if record["status"] == "ok"]
    assert len(scored) >= 3
    assert all({"value", "low", "high", "other_feature", "top_token"} <= set(score) for score in scored)
    assert any(score["value"] is not None for score in scored)
    assert "feature" in (run_dir / "report.html").read_text()
    names = {"explanations.jsonl", "report.html", "activations/manifest.json", "activations/00000.safetensors"}
    assert {name for name in contents_of(run_dir) if not name.startswith("sae/")} == names


def test_the_output_says_what_runs_and_where_the_results_are(finished, mistral_folder):
    run_dir, ran = finished
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"explain: {mistral_folder}")
    for line in (
        "engine    mistral-inference",
        "layer     1 of 0 to 2 (blocks.1.hook_resid_post)",
        f"features  64 of {run_dir / 'sae'}",
        "explainer offline: counting, without a model, since neither OPENAI_API_KEY nor OPENAI_BASE_URL is set",
        f"labels    {run_dir / 'explanations.jsonl'}",
        f"report    {run_dir / 'report.html'}",
    ):
        assert line in lines
    assert any(line.startswith("6 features: ") for line in lines)


def test_features_that_tell_a_concept_of_python_are_explained_beside_those_that_are_drawn(
    here, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(naming, "LEAST_F1", 0.05)
    monkeypatch.setattr(naming, "LEAST_LIFT", 0)
    source = "def f{i}(x):\n    raise Exception({i})\n\n\nimport os\nerror = f{i}({i}, 2)\n"
    documents = [{"text": source.format(i=i) * 3} for i in range(60)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    write_sae(tmp_path / "run/sae")
    of = {"DATA_PATH": tmp_path / "code.jsonl"}
    ran = here(arguments(tmp_path / "run", SELECT="random 5", **of))
    assert ran.code == 0, ran.err
    labels = labels_of(tmp_path / "run")
    beside = [label for label in labels if label.is_beside]
    assert len(labels) - len(beside) == 5
    assert beside
    assert all(label.concept and label.explanation in IN_WORDS.values() for label in beside)
    assert re.search(rf"^5 features: .*^beside them {len(beside)} that tell a concept", ran.out, re.M | re.S)
    assert here(arguments(tmp_path / "run", SELECT=beside[0].feature, **of)).code == 0  # now it is asked for
    again = labels_of(tmp_path / "run")
    assert [label.concept for label in again] == [label.concept for label in labels]
    assert [label for label in again if label.is_beside] == beside[1:]


@pytest.mark.parametrize(
    ("documents", "constants", "advice"),
    [
        (1, {}, "use text of more files, or a .jsonl with a document a line"),
        (300, {"EXPLAIN_STRIDE": 50}, "lower EXPLAIN_STRIDE, by which 49 of 50 rows are left out"),
        (300, {"EXPLAIN_TOKENS": 300}, "raise EXPLAIN_TOKENS"),
    ],
)
def test_few_documents_are_said_to_give_few_examples(here, arguments, run_dir, tmp_path, documents, constants, advice):
    text = "def area(self):\n    return self.width * self.height\n" * max(2, 300 // documents)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": text}) + "\n") * documents)
    constants |= {"DATA_PATH": tmp_path / "a.jsonl", "HELD_OUT_FRACTION": 0.0001}
    ran = here(arguments(run_dir, **({"EXPLAIN_TOKENS": 40_000} | constants)))
    assert re.search(
        rf"warning: found \d+ documents to explain from and \d+ to score on, .*: {re.escape(advice)}\n", ran.out
    )


def test_a_short_run_leaves_the_error_stream_empty(finished):
    assert finished[1].err == ""


# ---- runs beside earlier ones ----


def test_a_second_run_reads_no_text_and_says_the_same(here, arguments, finished, run_dir):
    ran = here(arguments(run_dir))
    assert ran.code == 0, ran.err
    assert f"\ncache     {run_dir / 'activations'}: 3,0" in ran.out  # tokens, without each row's BOS
    assert "reading" not in ran.out
    assert (run_dir / "explanations.jsonl").read_bytes() == (finished[0] / "explanations.jsonl").read_bytes()


@pytest.mark.parametrize(
    "changed", [{"TOKENS_BEFORE": 2}, {"TOKENS_AFTER": 2}, {"EXAMPLES_PER_INTERVAL": 1}, {"SELECT": "0-9"}]
)
def test_other_examples_and_other_features_run_no_model(here, arguments, run_dir, monkeypatch, changed):
    before = contents_of(run_dir / "activations")
    monkeypatch.setattr("mistral_sae.model.language_model.LanguageModel._run", None)  # any forward would fail
    ran = here(arguments(run_dir, **changed))
    assert ran.code == 0, ran.err
    assert "reading" not in ran.out
    after = contents_of(run_dir / "activations")
    assert {name for name in after if after[name] != before[name]} <= {"manifest.json"}


@pytest.mark.parametrize(
    ("seed", "changed", "other"),
    [(0, {"CONTEXT_LENGTH": 24}, "corpus, or another part of it"), (1, {}, "autoencoder")],
)
def test_a_cache_of_something_else_is_made_again(here, arguments, run_dir, seed, changed, other):
    before = contents_of(run_dir / "activations")
    write_sae(run_dir / "sae", seed=seed)
    ran = here(arguments(run_dir, **changed))
    assert ran.code == 0, ran.err
    assert f"is of another {other}: made again\nreading " in ran.out
    assert contents_of(run_dir / "activations") != before


def test_a_pass_that_stops_leaves_no_explanations_of_another_autoencoder(here, arguments, run_dir, monkeypatch):
    assert here(arguments(run_dir)).code == 0
    labels = (run_dir / "explanations.jsonl").read_bytes()
    write_sae(run_dir / "sae", seed=1)
    monkeypatch.setattr("mistral_sae.explain.cache._shard_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(arguments(run_dir))
    assert not (run_dir / "explanations.jsonl").exists()
    assert (run_dir / "explanations-1.jsonl").read_bytes() == labels


def test_another_seed_makes_a_cache_again_only_where_it_shuffles_the_text(here, arguments, run_dir, monkeypatch):
    monkeypatch.setattr("mistral_sae.data.tokens.fits_in_memory", lambda path: False)
    assert "reading" in here(arguments(run_dir)).out  # in the order of the text, now
    assert "reading" not in here(arguments(run_dir, SEED=1)).out


def test_features_explained_later_stand_beside_those_of_earlier_runs(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = {label.feature: label for label in labels_of(folder)}
    ran = here(arguments(folder, SELECT="3-5"))
    assert ran.code == 0, ran.err
    after = {label.feature: label for label in labels_of(folder)}
    assert list(after) == sorted({*CHOSEN, 3, 4, 5})
    assert {f: after[f] for f in CHOSEN if f != 3} == {f: before[f] for f in CHOSEN if f != 3}
    assert f"labels    {folder / 'explanations.jsonl'}, beside 5 of earlier runs\n" in ran.out
    assert "\n3 features: 3 ok\n" in ran.out
    assert not (folder / "explanations-1.jsonl").exists()


@pytest.mark.parametrize("changed", [{"EXPLAIN_TOKENS": 2500}, {"TOKENS_BEFORE": 2}, {"damaged": True}, {}])
def test_labels_of_other_examples_or_of_another_explainer_are_set_aside(here, arguments, served, tmp_path, changed):
    folder = shutil.copytree(served[0], tmp_path / "run", ignore=shutil.ignore_patterns("explanations-1.jsonl"))
    if changed.pop("damaged", False):
        (folder / "explanations.jsonl").write_text('{"feature": 3, "expl')
    before = (folder / "explanations.jsonl").read_bytes()
    for feature in (3, 5):
        ran = here(arguments(folder, SELECT=feature, **changed))
        assert ran.code == 0, ran.err
        assert (folder / "explanations-1.jsonl").read_bytes() == before
        said = f"the explanations of earlier runs are in {folder / 'explanations-1.jsonl'}\n" in ran.out
        assert said == (feature == 3)
    assert not (folder / "explanations-2.jsonl").exists()
    labels = {label.feature: label.explainer for label in labels_of(folder)}
    kept = {} if changed or not before.endswith(b"\n") else dict.fromkeys(CHOSEN, "test-model")
    assert labels == kept | {3: "offline", 5: "offline"}


@pytest.mark.parametrize("killed_at", ["note", "write_labels", "report"])
def test_a_run_that_is_cut_off_as_it_writes_sets_nothing_of_its_own_aside(
    here, arguments, finished, tmp_path, monkeypatch, killed_at
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = (folder / "explanations.jsonl").read_bytes()

    def killed(*_, **__):
        raise SystemExit(9)

    place = {"note": "cache.note", "write_labels": "labels.write_labels", "report": "report.write_report"}[killed_at]
    with monkeypatch.context() as patched:
        patched.setattr(f"mistral_sae.explain.{place}", killed)
        assert here(arguments(folder, TOKENS_BEFORE=2)).code == 9
    ran = here(arguments(folder, TOKENS_BEFORE=2))
    assert ran.code == 0, ran.err
    assert (folder / "explanations-1.jsonl").read_bytes() == before
    assert not (folder / "explanations-2.jsonl").exists()
    assert [label.feature for label in labels_of(folder)] == CHOSEN


# ---- what is explained ----


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        ("[40, 3, 40]", [3, 40]),
        ("3,40", [3, 40]),
        ("10-13", [10, 11, 12, 13]),
        ("all", list(range(FEATURES))),
    ],
)
def test_select_names_features(here, arguments, run_dir, select, chosen):
    ran = here(arguments(run_dir, SELECT=select))
    assert ran.code == 0, ran.err
    assert [label.feature for label in labels_of(run_dir)] == chosen


def test_a_feature_that_is_explained_alone_has_no_other_to_compare_it_with(here, arguments, run_dir):
    ran = here(arguments(run_dir, SELECT="3"))
    assert (ran.code, ran.problems) == (0, [])
    assert [label.status for label in labels_of(run_dir)] == ["ok"]
    assert re.search(r"detection +0\.\d\d   another feature's explanation none, its top token 0\.\d\d", ran.out)


def firings_of(run_dir):
    return load_file(run_dir / "activations/00000.safetensors")["offsets"].diff()


def test_select_takes_the_densest(here, arguments, run_dir):
    assert here(arguments(run_dir, SELECT="densest 5")).code == 0
    firings = firings_of(run_dir)
    chosen = [label.feature for label in labels_of(run_dir)]
    assert len(chosen) == 5
    assert sorted(firings[chosen].tolist()) == sorted(firings.tolist())[-5:]


def test_select_draws_living_features_by_the_seed(here, arguments, run_dir):
    firings, drawn = firings_of(run_dir), []
    for seed in (0, 0, 1):
        # Another seed orders the corpus anew, too, and so its examples are others: only the draw is looked at
        ran = here(arguments(run_dir, SELECT="random 7", SEED=seed))
        assert ran.code == 0, ran.err
        drawn.append([label.feature for label in labels_of(run_dir)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7
    assert (firings[drawn[0]] > 0).all()


@pytest.mark.parametrize(
    "select", ["some", "random", "random 0", "64", "[3, 64]", "[3, 4", "0-4000000000", "9-4", "[3, x]", "-1"]
)
def test_a_bad_select_is_refused_in_one_line_and_nothing_is_lost(here, arguments, finished, tmp_path, select):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = contents_of(folder)
    ran = here(arguments(folder, SELECT=select, EXPLAIN_TOKENS=2000))  # examples that are not there yet
    assert_refused(ran, f"SELECT is '{select}': expected ")
    assert "reading" not in ran.out  # which takes long
    assert contents_of(folder) == before


# ---- the loaded model as its own explainer ----


def test_the_loaded_model_gives_each_feature_a_true_status(here, arguments, tmp_path, monkeypatch):
    write_sae(tmp_path / "sae")
    params = PARAMS | {"vocab_size": 274}  # of the tokenizer
    instruct = write_hugging_face_folder(tmp_path / "instruct", params, random_weights(params))
    changed = {"EXPLAINER": "mistral", "MISTRAL_MODEL_PATH": instruct, "SAE_PATH": tmp_path / "sae"}
    changed |= {"SELECT": "[3, 11]", "TOKENS_BEFORE": 2, "TOKENS_AFTER": 1}
    ran = here(arguments(tmp_path / "run", **changed, MAX_FAILED_SHARE=1.0))
    assert (ran.code, ran.problems) == (0, [])
    journal = tmp_path / "run/completions-mistral.jsonl"
    answered = journal.read_bytes()
    assert answered.count(b"\n") >= 2
    dry = here(arguments(tmp_path / "run", **changed, DRY_RUN=1))
    assert re.search(r"2 features need 0 requests, and \d+ that are answered already", dry.out)
    assert "$" not in dry.out
    labels = labels_of(tmp_path / "run")
    assert [label.feature for label in labels] == [3, 11]
    for label in labels:  # random weights give no JSON, and seldom an end
        assert label.explainer == "mistral"
        assert label.status in ("unparsed", "truncated")
        assert label.explanation == ""
    assert (tmp_path / "run/report.html").exists()

    def refuse(*arguments, **settings):
        raise AssertionError("what is in the journal is not generated again")

    monkeypatch.setattr(LanguageModel, "generate", refuse)
    again = here(arguments(tmp_path / "run", **changed, MAX_FAILED_SHARE=1.0))
    assert (again.code, again.problems) == (0, [])
    assert labels_of(tmp_path / "run") == labels
    assert journal.read_bytes() == answered


# ---- settings that are refused ----


def test_a_missing_autoencoder_names_train_py(here, arguments, tmp_path):
    assert_refused(here(arguments(tmp_path / "run")), "run train.py first")


@pytest.mark.parametrize(
    ("made", "said"), [({"d_model": 48}, "width 48 and layer 1, and"), ({"layer": 3}, "width 32 and layer 3, and")]
)
def test_an_autoencoder_of_another_model_is_refused_in_one_line(here, arguments, tmp_path, monkeypatch, made, said):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)  # before the model is loaded
    write_sae(tmp_path / "run/sae", **made)
    ran = here(arguments(tmp_path / "run"))
    assert_refused(ran, said)
    assert "of width 32 and layers 0 to 2: expected the model" in ran.problems[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"EXPLAINER": "claude"}, "EXPLAINER is 'claude': expected openai, mistral or offline"),
        (
            {"EXPLAINER": "mistral", "MISTRAL_MODEL_PATH": None},
            "EXPLAINER is 'mistral': expected another, as the stand-in",
        ),
        ({"TEXT": ""}, "TEXT is empty"),
        ({"SCORERS": "detection guessing"}, "SCORERS is 'detection guessing': expected any of detection"),
        ({"EXPLAIN_TOKENS": 31}, "EXPLAIN_TOKENS is 31"),
        ({"CONCURRENCY": 0}, "CONCURRENCY is 0"),
        ({"MAX_DOLLARS": 0}, "MAX_DOLLARS is 0"),
        ({"MAX_FAILED_SHARE": 2}, "MAX_FAILED_SHARE is 2"),
        ({"TEXT": " "}, "TEXT is ' '"),
        (
            {"OPENAI_BASE_URL": "http://localhost:9/v1"},
            "OPENAI_MODEL is None: expected the server's name for its model",
        ),
        ({"OPENAI_BASE_URL": "localhost:9/v1", "OPENAI_MODEL": "x"}, "expected one like http://localhost:8000/v1"),
    ],
)
def test_a_setting_that_no_run_can_use_is_refused_before_loading(here, arguments, run_dir, monkeypatch, changed, said):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    assert_refused(here(arguments(run_dir, **changed)), said)


def test_a_second_run_in_a_folder_is_refused_before_loading(here, arguments, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("mistral_sae.loading.load_model", None)
    folder = shutil.copytree(finished[0], tmp_path / "run")
    before = contents_of(folder)
    with Server(reply) as server, locked(folder):
        assert_refused(here(arguments(folder, **openai(server))), f"found another run at work in {folder}")
    assert server.log == []
    assert contents_of(folder) | {".lock": b""} == before | {".lock": b""}


def test_a_damaged_log_is_found_before_anything_is_explained(here, arguments, finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "metrics.jsonl").write_text("damaged\n")
    before = contents_of(folder)
    ran = here(arguments(folder, SELECT="all"))
    assert_refused(ran, f"line 1 of {folder / 'metrics.jsonl'}")
    assert "explaining" not in ran.err
    assert contents_of(folder) == before
