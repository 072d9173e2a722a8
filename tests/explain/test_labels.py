"""SELECT, what is kept of earlier labels, and what lines of explanations.jsonl say."""

import json

import pytest
import torch

from mistral_sae.cli import UserError
from mistral_sae.explain.labels import merge_labels, parse_select, read_labels, to_json, write_labels
from mistral_sae.explain.types import Concept, Judgement, Label, Score
from mistral_sae.files import SAEError

SCORE = Score(0.8, 0.7, 0.9, 0.5, None, 9, 1, recall=(0.5, None, 1.0, 1.0), r2=0.1, requests=(("ok", 3), ("failed", 1)))
SCORED = Label(
    3, "x", "m", "ok", {"detection": SCORE, "fuzzing": SCORE}, (Judgement("detection", "hard", 2, False, None),), "why"
)


def read_back(folder, line):
    (folder / "explanations.jsonl").write_text(line + "\n")
    (label,) = read_labels(folder / "explanations.jsonl").values()
    return label


TOLD = SCORED._replace(concept=Concept("number", 0.76, 11.0, 0.4), is_beside=True)


@pytest.mark.parametrize("label", [SCORED, TOLD, Label(7, "", "m", "dead", {}, (), "never \U0001f525 fired")])
def test_a_label_reads_back_from_its_line(tmp_path, label):
    line = to_json(label)
    assert "\n" not in line
    assert line.isascii()
    assert read_back(tmp_path, line) == label
    assert {"feature", "explanation", "explainer", "scores", "status"} <= set(json.loads(line))


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"feature": 1', '{"scores": {"detection": 3}}', "null"])
def test_a_line_that_is_no_label_is_said_so(tmp_path, line):
    with pytest.raises(SAEError, match=r"^found .* in line 1 of .*, expected .*: remove it, or run explain\.py again$"):
        read_back(tmp_path, line)


def test_half_a_character_reads_back_as_one_that_is_not_known(tmp_path):
    label = read_back(tmp_path, to_json(SCORED._replace(reason="\ud83d and \\ud83d and \U0001f525")))
    assert label.reason == "\ufffd and \\ud83d and \U0001f525"


def test_what_a_terminal_would_obey_is_read_as_its_number(tmp_path):
    label = read_back(tmp_path, to_json(SCORED._replace(explanation="\x1b[2Jred\u202e", explainer="m\r")))
    assert (label.explanation, label.explainer) == ("\\x1b[2Jred\\u202e", "m\\r")


def test_scores_without_a_value_are_null_in_json(tmp_path):
    label = Label(1, "x", "m", "ok", {"fuzzing": Score(None, None, None, None, None, 0, 3)}, ())
    assert json.loads(to_json(label))["scores"]["fuzzing"]["value"] is None
    assert read_back(tmp_path, to_json(label)) == label


def ok(feature, explainer="m", text="new"):
    return Label(feature, text, explainer, "ok", {}, ())


def failed(feature):
    return Label(feature, "", "m", "failed", {}, (), "down")


def test_labels_stand_beside_earlier_ones_and_an_answer_is_not_replaced_by_none(tmp_path):
    path = tmp_path / "explanations.jsonl"
    write_labels(path, [ok(1, text="old"), ok(2, text="old"), failed(5), ok(9, text="old")])
    labels = {2: failed(2), 4: ok(4), 5: ok(5), 9: ok(9)}
    found, moved_to = merge_labels(path, labels, of_other_examples=False)
    assert list(found.values()) == [ok(1, text="old"), ok(2, text="old"), ok(4), ok(5), ok(9)]
    assert moved_to is None
    assert path.exists()


def test_scores_by_other_scorers_stay_where_the_explanation_is_the_same(tmp_path):
    path, unanswered = tmp_path / "explanations.jsonl", SCORE._replace(value=None, answered=0)
    write_labels(path, [SCORED])
    again = SCORED._replace(scores={"fuzzing": unanswered, "simulation": SCORE}, judgements=())
    found, _ = merge_labels(path, {3: again}, of_other_examples=False)
    assert found[3] == SCORED._replace(scores={"fuzzing": SCORE, "simulation": SCORE, "detection": SCORE})
    other = again._replace(explanation="another")
    assert merge_labels(path, {3: other}, of_other_examples=False)[0] == {3: other}


@pytest.mark.parametrize(("explainer", "of_other_examples"), [("another", False), ("m", True)])
def test_labels_of_another_explainer_or_other_examples_are_moved_not_overwritten(
    tmp_path, explainer, of_other_examples
):
    path = tmp_path / "explanations.jsonl"
    for number in (1, 2):
        write_labels(path, [ok(1, explainer), ok(2, explainer)])
        before = path.read_bytes()
        found, moved_to = merge_labels(path, {1: ok(1)}, of_other_examples=of_other_examples)
        assert moved_to == tmp_path / f"explanations-{number}.jsonl"
        assert moved_to.read_bytes() == before
        assert found == ({1: ok(1)} if of_other_examples else {1: ok(1), 2: ok(2, explainer)})


def test_a_file_of_something_else_is_refused_by_readers_and_moved_by_writers(tmp_path):
    path = tmp_path / "explanations.jsonl"
    assert merge_labels(path, {1: ok(1)}, of_other_examples=True) == ({1: ok(1)}, None)
    path.write_text("nonsense\n")
    with pytest.raises(SAEError, match="found no JSON"):
        read_labels(path)
    _, moved_to = merge_labels(path, {1: ok(1)}, of_other_examples=False)
    assert moved_to.read_text() == "nonsense\n"


def line(feature, explanation, status="ok", scores=None):
    record = {"feature": feature, "explanation": explanation, "explainer": "offline", "status": status}
    return json.dumps(record | {"scores": scores or {}})


def test_five_keys_are_enough_and_the_last_line_of_a_feature_counts(tmp_path):
    path = tmp_path / "explanations.jsonl"
    assert read_labels(path) == {}
    lines = [line(3, "old"), line(4, "", "no pattern"), line(3, "new", scores={"detection": {"value": 0.8, "more": 1}})]
    path.write_text("\n".join(lines))
    found = read_labels(path)
    assert found[3] == Label(3, "new", "offline", "ok", {"detection": Score(0.8)})
    assert found[4] == Label(4, "", "offline", "no pattern", {})


def test_a_damaged_line_of_explanations_is_named(tmp_path):
    path = tmp_path / "explanations.jsonl"
    path.write_text("\n".join([line(3, "one"), "{nonsense", line(4, "two")]))
    with pytest.raises(SAEError, match="line 2") as error:
        read_labels(path)
    assert "\n" not in str(error.value)


FIRED = torch.tensor([5, 0, 9, 1, 0, 7])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        (" Densest 2", [2, 5]),
        ("densest 100", [0, 2, 3, 5]),
        ("1-3", [1, 2, 3]),
        ("[4, 1,4]", [1, 4]),
        ("(3,)", [3]),
        ("3, 0", [0, 3]),
        (3, [3]),
    ],
)
def test_select_names_features(words, expected):
    selection = parse_select(words)
    selection.check(6)
    assert selection.choose(FIRED, seed=0) == expected


def test_a_random_selection_follows_its_seed_and_leaves_out_dead_features():
    chosen = [parse_select("random 3").choose(FIRED, seed) for seed in range(20)]
    assert chosen[0] == parse_select("random 3").choose(FIRED, 0)
    assert len(set(map(tuple, chosen))) > 1
    assert all(len(each) == 3 and not {1, 4} & set(each) for each in chosen)


@pytest.mark.parametrize("words", ["", "none", "random", "random 0", "3-1", "[3", "3 4", "-1", "densest -2"])
def test_a_selection_that_names_nothing_is_refused(words):
    with pytest.raises(UserError, match="expected all, random N"):
        parse_select(words)


@pytest.mark.parametrize("words", ["6", "0-6", "[1, 6]"])
def test_a_feature_that_the_autoencoder_does_not_have_is_refused(words):
    with pytest.raises(UserError, match="expected features from 0 to 5"):
        parse_select(words).check(6)
