import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from matplotlib.image import imread
from report_records import make_label, make_run

from mistral_sae.explain.figures import (
    COLOURS,
    geometry_panels,
    percent,
    plot_training,
    score_panels,
    svg,
    training_panels,
)
from mistral_sae.explain.pages import TEMPLATES
from mistral_sae.explain.scoring import summarize_scores


def titles(history, evaluation, density_F):
    return [panel.title for panel in training_panels(history, evaluation, density_F)]


def all_panels():
    run = make_run()
    return [
        *training_panels(run.metrics, run.evaluation, run.density_F),
        *score_panels(summarize_scores(make_label(index).scores for index in range(40))),
        *geometry_panels(run.geometry),
    ]


# ---- what is drawn ----


def test_a_run_is_drawn_as_far_as_it_was_recorded():
    run = make_run()
    every = ["Normalized MSE", "Cross-entropy", "Dead features", "Density"]
    assert titles(run.metrics, run.evaluation, run.density_F) == every
    assert titles([{"tokens": 1000, "normalized_mse": 0.5}], {}, torch.zeros(5)) == ["Normalized MSE"]
    assert titles([], run.evaluation, run.density_F) == ["Density"]
    assert titles([], {}, torch.zeros(5)) == []


def test_dead_features_are_drawn_only_where_they_are_more_than_a_few():
    history = [{"tokens": 1000, "normalized_mse": 0.5, "dead": 9}]
    assert "Dead features" not in titles(history, {}, torch.ones(1000))
    assert "Dead features" in titles([*history, {"tokens": 2000, "dead": 10}], {}, torch.ones(1000))


def test_cross_entropy_is_drawn_where_it_was_measured_more_than_once():
    run = make_run()
    once = [{key: value for key, value in record.items() if "ce_" not in key} for record in run.metrics]
    assert "Cross-entropy" not in titles(once, run.evaluation, run.density_F)


def test_the_meaning_of_a_picture_holds_what_the_picture_leaves_out():
    run = make_run()
    density_F = torch.cat([run.density_F, torch.zeros(3)])
    meanings = " ".join(panel.meaning for panel in training_panels(run.metrics, run.evaluation, density_F))
    assert "Its mean there gives 7.90; 98.2% of the difference is recovered." in meanings
    assert "3 of 1,003 never fired." in meanings


def test_an_interval_of_which_no_passage_was_judged_has_no_bar():
    recall = (None, 0.0, 0.5, 1.0)
    score = make_label(0).scores["detection"]._replace(recall=recall)
    *_, panel = score_panels(summarize_scores([{"detection": score}]))
    texts = re.findall(r">([^<>]+)</text>", svg(panel))
    assert [text for text in texts if "%" in text] == ["0–25%", "25–50%", "50–75%", "75–100%"]  # noqa: RUF001
    assert [text for text in texts if re.fullmatch(r"\d\.\d\d", text)] == ["0.00", "0.50", "1.00"]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (-0.5, "-50%"),
        (0, "0%"),
        (1e-7, "0.00001%"),
        (0.000118, "0.012%"),
        (0.00101, "0.1%"),
        (0.5, "50%"),
        (0.98159, "98.2%"),
        (1, "100%"),
    ],
)
def test_shares_are_written_with_the_digits_that_matter(share, text):
    assert percent(share) == text


# ---- how it is drawn ----


@pytest.mark.parametrize("panel", all_panels(), ids=lambda panel: panel.title)
def test_a_picture_of_the_page_has_its_colours_and_font_and_no_inline_style(panel):
    drawn = svg(panel)
    ElementTree.fromstring(drawn)
    assert "var(--curve)" in drawn
    assert not re.search(r"#[0-9a-f]{6}|style|font-family", drawn)
    assert svg(panel) == drawn


def test_the_colours_are_those_of_the_page_in_the_light():
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", re.search(r":root \{(.*?)\}", css, re.DOTALL)[1]))
    assert COLOURS.items() <= light.items()


@pytest.mark.parametrize("known", ["everything", "one step"])
def test_training_is_drawn_into_a_png(tmp_path, known):
    run = make_run()
    if known == "everything":
        plot_training(tmp_path / "training.png", run.metrics, run.evaluation, run.density_F)
    else:
        plot_training(tmp_path / "training.png", run.metrics[:1], {"normalized_mse": 1.0}, torch.tensor([0.5]))
    pixels = imread(tmp_path / "training.png")
    assert pixels.shape[0] > 300
    assert len(set(map(tuple, pixels.reshape(-1, 4)[::7]))) > 20
