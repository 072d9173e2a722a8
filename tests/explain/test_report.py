import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from report_records import TOKENS, make_feature, make_label, make_run

from mistral_sae.explain.answers import Answers
from mistral_sae.explain.pages import TEMPLATES, compressed
from mistral_sae.explain.report import (
    CHUNK,
    command,
    main_score,
    pack,
    put_answers,
    token_shares,
    write_report,
    write_text_page,
)
from mistral_sae.explain.scoring import summarize_scores
from mistral_sae.explain.types import Example, Feature, Judgement, Label, Score
from mistral_sae.files import SAEError
from mistral_sae.sae.resume import read_evaluation, read_log

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text inside them."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if self.open and self.open[-1]["tag"] == tag:
            self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def data(self, identity):
        return unpack(next(e["text"] for e in self.all("script") if e.get("id") == identity))


def unpack(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def write(tmp_path, n=40, run=None, labelled=True):
    features = [make_feature(index) for index in range(n)]
    labels = {feature.feature: make_label(feature.feature) for feature in features if labelled}
    write_report(tmp_path / "report.html", run or make_run(), features, labels)
    return Page(tmp_path / "report.html")


def fires_on(*peaks):
    """A feature whose passages peak on the first of each pair, which the second follows; it raises 'a' and 'b'."""
    passages = tuple(Example("d", 1, ("x", peak, then), (0.0, 1.0, 0.0)) for peak, then in peaks)
    return make_feature(1)._replace(top=passages[:2], spread=passages[2:], promoted=(("a", 2.0), ("b", 1.0)))


# ---- kinds, scores, numbers ----


def test_an_input_feature_peaks_on_one_token_whatever_its_case_and_space():
    assert token_shares(fires_on(("def", "q"), (" Def", "q"), ("if", "q"))).same_token == pytest.approx(2 / 3)
    assert token_shares(fires_on(("def", "q"), ("for", "q"), ("if", "q"))).same_token == pytest.approx(1 / 3)


def test_an_output_feature_is_followed_by_what_it_raises_in_the_logit_lens():
    assert token_shares(fires_on(("x", "a"), ("y", "q"), ("z", "q"), ("w", "b"))).predicted_next == 0.5
    assert token_shares(fires_on(("x", "q"), ("y", "q"), ("z", "q"), ("w", "q"))).predicted_next == 0


def test_a_passage_that_ends_at_its_peak_says_nothing_of_what_comes_next():
    last = Example("d", 1, ("x", "y"), (0.0, 1.0))
    followed = fires_on(("x", "a"))
    assert token_shares(followed._replace(top=(*followed.top, last))).predicted_next == 1
    assert token_shares(make_feature(9)) == (0, 0)


def test_means_of_scores_leave_out_what_was_not_answered():
    none = Score(None, None, None, 0.9, 0.9, 0, 5)
    labels = [
        Label(1, "x", "m", "ok", {"detection": Score(0.9, 0, 1, 0.5, None, 9, 0, (None, 0.8))}, ()),
        Label(2, "x", "m", "ok", {"detection": Score(0.7, 0, 1, None, 0.6, 9, 0, (0.2, 0.4))}, ()),
        Label(3, "x", "m", "ok", {"detection": none}, ()),
    ]
    (summary,) = summarize_scores(label.scores for label in labels)
    assert (summary.method, summary.features, summary.value) == ("detection", 2, pytest.approx(0.8))
    assert (summary.other_feature, summary.top_token) == (0.5, 0.6)
    assert summary.recall == (0.2, pytest.approx(0.6))


def test_the_score_of_a_feature_is_the_first_that_has_a_value():
    none, some = Score(None, None, None, None, None, 0, 5), Score(0.4, 0, 1, 0, 0, 5, 0)
    assert main_score(Label(1, "x", "m", "ok", {"simulation": some, "detection": none}, ())) == 0.4
    assert main_score(Label(1, "x", "m", "ok", {}, ())) is None
    assert main_score(None) is None


def test_what_is_not_finite_becomes_null_and_odd_characters_survive():
    feature = make_feature(1)._replace(maximum=math.inf, promoted=(("\ud800\x00</script>\u2028😀", math.nan),))
    index, chunks = pack([feature], {})
    assert unpack(compressed(index))["maximum"] == [None]
    assert unpack(chunks[0])[0]["promoted"] == [["\ud800\x00</script>\u2028😀", None]]
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", compressed("</script>"))


# ---- the data of a report ----


def test_the_index_and_the_chunks_are_in_one_order(tmp_path):
    order = [7, 3, *range(10, 10 + CHUNK)]
    write_report(tmp_path / "report.html", make_run(), (make_feature(i) for i in order), {3: make_label(3)})
    page = Page(tmp_path / "report.html")
    index = page.data("index")
    assert index["feature"] == order
    assert index["explanation"][:2] == ["", make_label(3).explanation]
    for place in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1):
        chunk = page.data(f"chunk-{place // index['chunk']}")
        assert chunk[place % index["chunk"]]["feature"] == order[place]


def test_the_index_finds_features_by_tokens_they_fire_on_and_of_their_logit_lens():
    feature, label = make_feature(5), make_label(5)
    index, _ = pack([feature], {5: label})
    assert index["fires_on"][0][0] == feature.top[0].tokens[feature.top[0].peak]
    assert index["logit_lens"] == [[token for token, _ in feature.promoted[:5]]]
    assert index["score"] == [pytest.approx(label.scores["detection"].value, abs=5e-4)]


def test_a_passage_keeps_its_tokens_and_where_they_are_active():
    feature = make_feature(5)
    _, chunks = pack([feature], {})
    source, start, tokens, places, values = unpack(chunks[0])[0]["top"][0]
    example = feature.top[0]
    assert (source, start, tuple(tokens)) == (example.document, example.start, example.tokens)
    restored = [0.0] * len(tokens)
    for place, value in zip(places, values, strict=True):
        restored[place] = value
    assert restored == pytest.approx(example.activations, rel=5e-3)


def test_each_judgement_comes_with_its_passage_or_without_one_that_is_gone():
    feature = make_feature(5)
    judgements = (
        Judgement("detection", "hard", 2, False, None),
        Judgement("detection", "held_out", 4, True, False),
        Judgement("detection", "held_out", 99, True, True),
    )
    _, chunks = pack([feature], {5: make_label(5)._replace(judgements=judgements)})
    (record,) = unpack(chunks[0])
    assert record["judged"] == [
        ["detection", "hard 2", False, None],
        ["detection", "held_out 4", True, False],
        ["detection", "held_out 99", True, True],
    ]
    passages = record["judged_passages"]
    assert passages["hard 2"][0] == feature.hard[2].document
    assert passages["held_out 4"][0] == feature.held_out[4].document
    assert "held_out 99" not in passages


def test_features_are_held_a_chunk_at_a_time():
    alive = most = 0

    class Counted(Feature):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def features():
        nonlocal alive, most
        for index in range(5 * CHUNK):
            alive += 1
            most = max(most, alive)
            yield Counted(*make_feature(index))

    pack(features(), {})
    assert alive == 0
    assert most <= 2 * CHUNK


# ---- the page ----


def test_the_page_allows_its_own_script_and_style_and_nothing_else(tmp_path):
    page = write(tmp_path)
    (policy,) = [meta["content"] for meta in page.all("meta") if "content-security-policy" in str(meta).lower()]

    def allowed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    (script,) = [e["text"] for e in page.all("script") if "type" not in e]
    (style,) = page.all("style")
    assert f"script-src {allowed(script)};" in policy
    assert f"style-src {allowed(style['text'])};" in policy
    for element in page.elements:
        assert "src" not in element
        assert "style" not in element
        assert not [name for name in element if name.startswith("on")]
        assert element.get("href", "#").startswith(("#", "data:,"))


def test_the_run_is_shown_with_its_figures_and_what_they_mean(tmp_path):
    text = " ".join(write(tmp_path).all("main")[0]["text"].split())
    for words in ("blocks.2.hook_resid_post", "1,758 files", "1,500,000", "32.0", "0.096", "98.2%", "0.01%", "2.8%"):
        assert words in text
    titles = [e["text"] for e in Page(tmp_path / "report.html").all("strong")]
    assert {"Normalized MSE", "Dead features", "Cross-entropy", "Density", "Scores"} <= set(titles)
    assert {"Found, by strength", "Decoder cosines", "Features a dimension"} <= set(titles)
    labels = [make_label(index) for index in range(40)]
    (detection, *_) = summarize_scores(label.scores for label in labels)
    assert f"the mean detection score is {detection.value:.2f}" in text
    assert f"with another feature's explanation in its place it is {detection.other_feature:.2f}" in text


def test_features_explained_for_their_concept_count_in_no_mean_and_the_run_says_how_many_there_are(tmp_path):
    low = {"detection": Score(0.1)}
    beside = {50 + i: Label(50 + i, "numbers", "offline", "ok", low, is_beside=True) for i in range(3)}
    labels = {index: make_label(index) for index in range(40)}
    write_report(tmp_path / "report.html", make_run(), map(make_feature, [*labels, *beside]), labels | beside)
    text = " ".join(Page(tmp_path / "report.html").all("main")[0]["text"].split())
    (detection, *_) = summarize_scores(label.scores for label in labels.values())
    assert f"the mean detection score is {detection.value:.2f}" in text
    assert "; 3 tell a concept of Python best of all" in text


def test_a_run_of_which_nothing_is_known_says_so(tmp_path):
    run = make_run()._replace(evaluation={}, metrics=[], density_F=torch.zeros(3), geometry=None)
    page = write(tmp_path, n=3, run=run, labelled=False)
    assert len(page.all("svg")) == 0
    notices = " ".join(e["text"] for e in page.all("p") if e.get("class") == "notice")
    assert "no evaluation.json" in notices
    assert "No feature has a score yet" in notices
    assert "geometry was not measured" in notices


@pytest.mark.parametrize(
    ("executable", "called"),
    [
        (".venv/bin/python", ".venv/bin/python"),
        ("active/bin/python", "python"),
        ("active/bin/python3", "python3"),
        ("/opt/bin/python", "/opt/bin/python"),
    ],
)
def test_a_command_calls_the_python_that_runs_as_a_shell_here_does(monkeypatch, tmp_path, executable, called):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / executable))
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / "active/bin" / name))
    constants = SimpleNamespace(MISTRAL_MODEL_PATH=None, SAE_PATH=None, HOOK_NAME=None, RUN_DIR="runs/k")
    assert command("analyse.py", constants) == f"{called} analyse.py RUN_DIR=runs/k"


def test_the_command_that_steers_names_the_model_and_the_autoencoder_of_the_run(monkeypatch):
    monkeypatch.setattr("sys.executable", "/usr/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    constants = SimpleNamespace(MISTRAL_MODEL_PATH=None, SAE_PATH=None, HOOK_NAME=None, RUN_DIR="runs/k 64")
    assert command("demo.py", constants) == "python demo.py 'RUN_DIR=runs/k 64'"
    constants.MISTRAL_MODEL_PATH, constants.SAE_PATH = "/models/7B", "owner/sae"
    assert (
        command("demo.py", constants)
        == "python demo.py MISTRAL_MODEL_PATH=/models/7B SAE_PATH=owner/sae 'RUN_DIR=runs/k 64'"
    )


def test_a_report_without_features_can_be_written(tmp_path):
    page = write(tmp_path, n=0)
    assert page.data("index")["feature"] == []


def test_the_ids_of_a_page_are_its_own_whatever_pictures_are_on_it(tmp_path):
    identities = [element["id"] for element in write(tmp_path).elements if "id" in element]
    assert len(identities) == len(set(identities))


def test_what_a_run_is_called_is_text_and_no_markup(tmp_path):
    hostile = '<script>alert("x")</script>{{ 7 * 7 }}\udcff'
    run = make_run()._replace(model=hostile, corpus=hostile, sae_path=hostile, hook_name=hostile)
    page = write(tmp_path, n=2, run=run)
    assert len([e for e in page.all("script") if "type" not in e]) == 1
    assert page.all("main")[0]["text"].count('<script>alert("x")</script>{{ 7 * 7 }}?') == 4


def test_the_same_records_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, make_run(), [make_feature(0)], {0: make_label(0)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    write(tmp_path)
    old = (tmp_path / "report.html").read_bytes()

    def features():
        yield make_feature(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report.html", make_run(), features(), {})
    assert (tmp_path / "report.html").read_bytes() == old


def test_the_figures_of_a_run_are_read_up_to_a_torn_line(tmp_path):
    assert (read_evaluation(tmp_path), read_log(tmp_path)) == ({}, [])
    (tmp_path / "evaluation.json").write_text('{"l0": 32.0}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert (read_evaluation(tmp_path), read_log(tmp_path)) == ({"l0": 32.0}, [{"step": 1, "tokens": 10}])
    (tmp_path / "evaluation.json").write_text('{"l0"')
    with pytest.raises(SAEError, match=r"found no JSON .* in .*evaluation.json, .*: delete it or train again"):
        read_evaluation(tmp_path)


def test_the_page_of_a_text_holds_its_tokens_and_the_explanations_of_what_fires(tmp_path):
    tokens = [("def", ((3, 2.0), (4, 1.0))), (" x", ())]
    labels = {3: make_label(3), 5: make_label(5)}
    write_text_page(tmp_path / "text.html", "a model", 7, tokens, labels, [make_feature(3), make_feature(5)])
    page = Page(tmp_path / "text.html")
    assert "features of layer 7; read by\n    a model." in page.all("main")[0]["text"]
    data = page.data("text-data")
    assert data["tokens"] == [["def", [[3, 2.0], [4, 1.0]]], [" x", []]]
    assert data["explanations"] == {"3": make_label(3).explanation}
    assert data["maxima"] == {"3": make_feature(3).maximum}
    assert data["fires_on"]["3"][0] == TOKENS[3]


# ---- the style ----


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_what_is_behind_it(theme):
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]))
    assert len(colours) == 13
    for text, behind in [
        *((text, behind) for text in ("ink", "muted", "accent") for behind in ("paper", "raised", "sunken")),
        ("ink", "hot"),
        ("good", "paper"),
        ("bad", "paper"),
    ]:
        assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)


def test_the_templates_are_part_of_the_package():
    pyproject = (Path(__file__).parent.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"templates/*"' in pyproject


# ---- the answers of analyse.py ----

ANSWERS = Answers.model_validate(
    {
        "autoencoder": "a hash",
        "limits": "One model.",
        "superposed": {"sentence": "Yes: <b>many</b> directions."},
        "monosemantic": {
            "sentence": "Partly: F1 0.5, at random 0.2.",
            "concepts": [{"concept": "comma", "feature": 7}, {"concept": "self", "feature": 3}],
            "matrix": [[0.5, 0.1], [0.0, 0.9]],
        },
    }
)


def test_a_report_without_answers_says_what_gives_them(tmp_path):
    page = write(tmp_path, 2)
    assert "python analyse.py RUN_DIR=runs/standin" in next(
        e["text"] for e in page.all("section") if e["id"] == "answers"
    )


def test_the_answers_come_first_and_the_matrix_has_the_clearest_concept_at_its_top(tmp_path):
    page = write(tmp_path, 2, make_run()._replace(answers=ANSWERS))
    first = next(element for element in page.all("dl") if element.get("class") in ("answers", "facts"))
    assert first["class"] == "answers"
    assert first["text"].index("Partly") < first["text"].index("Yes: <b>many</b>")
    svg = next(element for element in page.all("svg") if element.get("aria-label", "").startswith("F1"))
    texts = [element["text"] for element in page.all("text") if element["text"] in svg["text"]]
    assert [text for text in texts if text in ("self", "comma", "#3", "#7")] == ["self", "comma", "#3", "#7"]
    shades = [float(rect["fill-opacity"]) for rect in page.all("rect") if "F1" in rect["text"]]
    assert shades == [0.9, 0.1, 0.5]


def test_answers_are_put_into_a_report_that_is_there_and_again_in_the_same_place(tmp_path):
    path, run = tmp_path / "report.html", make_run()
    assert not put_answers(path, ANSWERS)
    assert not path.exists()
    write(tmp_path, 2, run._replace(answers=ANSWERS))
    whole = path.read_text(encoding="utf-8")
    write(tmp_path, 2, run)
    for _ in range(2):
        assert put_answers(path, ANSWERS)
        assert path.read_text(encoding="utf-8") == whole
    path.write_text("a report of another version", encoding="utf-8")
    assert not put_answers(path, ANSWERS)
