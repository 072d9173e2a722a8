"""Planted causes: a direction that the model reads, and one that it does not."""

import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mistral_sae.analysis import causal, edits
from mistral_sae.analysis.causal import FEATURE, MEANS, NEURON, OTHER, RANDOM
from mistral_sae.analysis.edits import Prompt, Written
from mistral_sae.analysis.monosemantic import Found
from mistral_sae.analysis.sample import Texts, read_activity
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, Metadata
from mistral_sae.steer.sweep import Measured

D, LAYER, N_FEATURES = 32, 2, 4
CODE = "import os\n\ndef load(path, mode):\n    return open(path, mode).read() + path.strip() + mode\n"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lm(mistral_folder):
    return load_model(mistral_folder, device="cpu")


@pytest.fixture
def loaded() -> LoadedSAE:
    sae = SparseAutoencoder(D, N_FEATURES, 1).requires_grad_(False)
    sae.W_dec.copy_(normalize(randn(N_FEATURES, D, seed=0), dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    return LoadedSAE(sae, Metadata("tiny", f"blocks.{LAYER}.hook_resid_post", LAYER, True, 32, "text"))


@pytest.fixture
def texts(lm) -> Texts:
    """Four documents, a row each; two of them to score on."""
    tokens = torch.tensor([[lm.tokenizer.bos_id, *lm.tokenizer.encode(CODE)][:40]] * 4)
    kept = lm.kept(tokens)
    document = torch.arange(4)[:, None].expand(tokens.shape)[kept]
    labels = torch.zeros(len(document), 2, dtype=torch.bool)
    labels[::5, 0] = labels[1::7, 1] = True
    return Texts(tokens, kept, labels, document, document % 2 == 0, ["colon", "comma"], list("abcd"))


def unread(lm) -> Tensor:
    """A direction (D) that the model's output matrix is made blind to: it is all that reads the last residual."""
    norm, head = lm._output()
    direction_D = normalize(randn(D, seed=1), dim=0)
    seen_D = normalize(norm.weight * direction_D, dim=0)
    with torch.no_grad():
        head.weight -= (head.weight @ seen_D)[:, None] * seen_D
    return direction_D


def test_taking_away_what_the_model_reads_moves_it_where_it_was_and_nowhere_else(lm, loaded, texts):
    activity = read_activity(lm, loaded.sae, LAYER, texts, 2)
    fires_N = activity.indices_NK.squeeze(1) == 0
    assert 0 < fires_N.sum() < len(fires_N)
    row_CD = loaded.sae.W_dec[:1]
    found = edits.ablate(lm, loaded, texts, activity, [0], {FEATURE: row_CD, RANDOM: unread(lm)[None]})
    is_last_N = torch.arange(len(fires_N)) % (len(fires_N) // 4) == len(fires_N) // 4 - 1  # of its row: nothing follows
    assert found.tokens.sum() == (~texts.fit_N & ~is_last_N).sum()
    assert found.tokens[0].sum() == (fires_N & ~texts.fit_N & ~is_last_N).sum()
    assert found.tokens[:, :, [0, 2]].sum() == 0  # where directions were chosen
    feature, control = (each.sum(dim=(1, 2)) for each in (found.sums[FEATURE], found.sums[RANDOM]))
    assert feature[0] > 20 * control[0]
    assert feature[1] == pytest.approx(0, abs=1e-4)  # no attention follows


def test_pushing_towards_a_token_writes_it_and_a_random_push_does_not(lm, loaded, monkeypatch):
    norm, head = lm._output()
    colon = lm.tokenizer.encode(":")[0]
    with torch.no_grad():
        head.weight[colon] *= 6
    read_D = normalize(norm.weight * head.weight[colon], dim=0).detach()
    unread_D = randn(D, seed=5)
    along = {FEATURE: read_D[None], RANDOM: (unread_D - unread_D @ read_D * read_D)[None]}
    monkeypatch.setattr(edits, "SIZES", (0.0, 4.0))
    monkeypatch.setattr(edits, "NEW_TOKENS", 10)
    prompts = [Prompt(i, lm.encode(CODE[:20]), CODE[:20]) for i in range(2)]
    written = edits.push(lm, loaded, prompts, ["colon"], [0], along, seed=0)
    rates_KZ = written.rate_PKCZ.mean(dim=0).squeeze(1)
    assert rates_KZ[0, 1] > 900
    assert rates_KZ[1, 1] < 50
    torch.testing.assert_close(written.rate_PKCZ[:, :, 0, 0], written.own_PC.expand(2, 2))  # no push is no edit


def test_every_direction_is_as_long_as_the_features_row_and_the_means_differ_by_the_concept(lm, loaded, texts):
    activity = read_activity(lm, loaded.sae, LAYER, texts, 4)
    neurons = found_of([3, 48 + 5], [0.5, 0.5])  # of 48 neurons, the second with a minus
    along = causal.directions_to_edit(lm, loaded, texts, activity, neurons, [0, 1], [0, 1], seed=0)
    assert set(along) == {FEATURE, MEANS, NEURON, OTHER, RANDOM}
    for rows_CD in along.values():
        torch.testing.assert_close(rows_CD.norm(dim=1), loaded.sae.W_dec[:2].norm(dim=1))
    z, label = activity.z_ND[texts.fit_N], texts.labels_NC[texts.fit_N, 0]
    expected = normalize(z[label].mean(dim=0) - z[~label].mean(dim=0), dim=0)
    torch.testing.assert_close(along[MEANS][0], expected * loaded.sae.W_dec[0].norm())
    writes_HD = dict(lm.block(LAYER).named_modules())["feed_forward.w2"].weight.T
    torch.testing.assert_close(
        normalize(along[NEURON], dim=1), normalize(writes_HD[[3, 5]] * torch.tensor([[1], [-1]]), dim=1)
    )


def found_of(directions: list[int], f1: list[float]) -> Found:
    f1_C = torch.tensor(f1)
    return Found(None, f1_C, f1_C, torch.tensor(directions), f1_C, f1_C, {})  # type: ignore[arg-type]


def test_concepts_are_taken_by_f1_each_with_a_feature_of_its_own_and_no_wide_ones(texts):
    labels = torch.zeros(len(texts.document_N), 4, dtype=torch.bool)
    labels[:, 3] = True
    of_four = texts._replace(labels_NC=labels, concepts=["a", "b", "c", "wide"])
    features = found_of([7, 8, 7, 9], [0.5, 0.6, 0.9, 1.0])
    assert causal.concepts_to_ask(features, of_four, None) == [2, 1]
    assert causal.concepts_to_ask(features, of_four, {"a", "wide"}) == [0]


def test_prompts_are_the_beginnings_of_definitions_one_a_document_to_score_on(lm, texts, monkeypatch):
    monkeypatch.setattr(edits, "PROMPT_TOKENS", 6)
    prompts = edits.prompts_of(texts, lm)
    assert len(prompts) == 1  # the same in both
    for prompt in prompts:
        assert prompt.text.startswith("def load(")
        assert prompt.ids[0] == lm.tokenizer.bos_id
        assert "".join(lm.tokenizer.strings(prompt.ids[1:])) == prompt.text


def test_a_concept_is_counted_after_the_prompt_in_a_thousand_characters():
    assert edits.rate_of("a: b\n::xx", len("a: b\n"), "colon") == 500
    assert edits.rate_of("a:", 2, "colon") == 0


def test_a_size_is_chosen_on_the_other_half_of_the_prompts_among_those_that_stay_fluent():
    fluent, broken = Measured(10, 1.0, 0.0, 0.0, 0.0, 0.0), Measured(10, 9.0, 0.0, 0.0, 0.0, 0.0)
    rates = torch.tensor([[1.0, 2.0], [4.0, 3.0]])[:, None, None, :]  # of two prompts, by size
    rows = [{"concept": "comma"}]
    chosen = causal.pushed_by_kind(
        Written(rates, torch.ones(2, 1), [[fluent, fluent]] * 2, [fluent] * 2), [FEATURE], rows, 0
    )
    assert chosen[FEATURE]["rate"] == (1.0 + 3.0) / 2  # the second prompt's best for the first, and the other way
    chosen = causal.pushed_by_kind(
        Written(rates, torch.ones(2, 1), [[fluent, broken]] * 2, [fluent] * 2), [FEATURE], rows, 0
    )
    assert chosen[FEATURE]["rate"] == (1.0 + 4.0) / 2


ABLATED = {
    kind: {"fires": 0.1, "low": 0.1, "high": 0.1, "elsewhere": 0.01, "feature less it": [0.01, 0.02]}
    for kind in (FEATURE, MEANS, NEURON, OTHER, RANDOM)
}
PUSHED = {kind: {"rate": 0.1, "feature less it": [0.01, 0.02]} for kind in ABLATED}
PUSHED |= {"own rate": 0.01, "raised": [0.01, 0.03]}


@pytest.mark.parametrize("kind", [NEURON, OTHER, RANDOM])
def test_the_answer_takes_both_edits_to_do_more_than_every_control(kind):
    level = {"feature less it": [-0.01, 0.02]}
    no_ablated, no_pushed = ABLATED | {kind: ABLATED[kind] | level}, PUSHED | {kind: PUSHED[kind] | level}
    assert causal.verdict(ABLATED, PUSHED)[0] == "yes"
    assert causal.verdict(no_ablated, PUSHED)[0] == causal.verdict(ABLATED, no_pushed)[0] == "partly"
    assert causal.verdict(no_ablated, no_pushed)[0] == causal.verdict(no_ablated, None)[0] == "no"
    assert causal.verdict(ABLATED | {MEANS: ABLATED[MEANS] | level}, PUSHED)[0] == "yes"  # it is told, no more


def test_a_concept_that_the_drawn_documents_lack_is_left_out_of_the_mean():
    tokens = torch.tensor([[[5.0, 5.0], [0.0, 5.0]]] * 2)
    taken = edits.Divergences({FEATURE: tokens * torch.tensor([1.0, 3.0])[:, None]}, tokens)
    found = causal.ablated_by_kind(taken, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    assert (found[FEATURE]["fires"], found[FEATURE]["elsewhere"]) == (2.0, 2.0)
    assert not math.isnan(found[FEATURE]["low"])


def test_draws_without_a_document_in_which_a_feature_fires_are_left_out_of_the_interval():
    tokens = torch.tensor([[[0.0, 5.0]]] * 2)
    taken = edits.Divergences({FEATURE: 3 * tokens}, tokens)
    found = causal.ablated_by_kind(taken, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    assert found[FEATURE]["low"] == found[FEATURE]["high"] == 3


def test_a_concept_whose_feature_fires_on_no_token_that_is_scored_has_no_kl(lm, loaded, texts):
    labels = torch.zeros_like(texts.labels_NC)
    labels[::7, 0] = labels[1::7, 1] = True
    texts, activity = texts._replace(labels_NC=labels), read_activity(lm, loaded.sae, LAYER, texts, 4)
    found = {"features": found_of([0, 1], [0.9, 0.8]), "basis directions": found_of([3, 5], [0.5, 0.5])}

    def answer(fires_N: Tensor) -> dict:
        some = activity._replace(indices_NK=fires_N[:, None], values_NK=torch.ones(len(fires_N), 1))
        found_out = causal.causality(lm, loaded, texts, some, found, False, 0)
        json.dumps(found_out, allow_nan=False)
        return found_out

    place_N = torch.arange(len(texts.fit_N))
    fires, silent = answer(torch.where(texts.fit_N, 1, place_N % 2 * 2))["concepts"]
    assert None not in fires["kl"].values()
    assert set(silent["kl"].values()) == {None}
    assert answer(torch.full_like(place_N, 2))["answer"] == "unclear"
