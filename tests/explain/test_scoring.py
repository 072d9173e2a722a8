import numpy as np
import pytest
from synthetic_features import make_feature, on

from mistral_sae.explain import scoring
from mistral_sae.explain.scoring import Simulated
from mistral_sae.explain.types import Example, Judgement


@pytest.fixture(scope="module")
def feature():
    return make_feature(3, on(" self"))


def judgements(right_true, wrong_true, right_false, wrong_false, unanswered=0):
    counts = [
        (True, True, right_true),
        (True, False, wrong_true),
        (False, False, right_false),
        (False, True, wrong_false),
    ]
    found = []
    for truth, verdict, count in [*counts, (True, None, unanswered)]:
        kind = "held_out" if truth else "random"
        found += [Judgement("detection", kind, len(found) + i, truth, verdict) for i in range(count)]
    return found


def accuracy_interval(judgements, seed):
    return scoring.verdict_score(judgements, seed)[1:3]


def correlation_interval(simulated, seed):
    return scoring.simulation_score(simulated, len(simulated), seed)[1:3]


# What is asked


def test_detection_asks_as_many_active_as_silent_passages_half_of_the_latter_hard(feature):
    questions = scoring.detection_questions(feature, 0)
    kinds = [question.kind for question in questions]
    assert kinds.count("held_out") == len(feature.held_out) == 20
    assert kinds.count("random") == kinds.count("hard") == 10
    assert {q.passage.interval(feature.maximum) for q in questions if q.truth} == {0, 1, 2, 3}
    for question in questions:
        assert question.passage == getattr(feature, question.kind)[question.index]
        assert question.truth == any(question.passage.activations)


@pytest.mark.parametrize(
    ("n_random", "n_hard", "expected"), [(10, 2, (12, 10, 2)), (0, 10, (10, 0, 10)), (3, 0, (3, 3, 0))]
)
def test_detection_stays_balanced_where_negatives_are_few(feature, n_random, n_hard, expected):
    few = feature._replace(random=feature.random[:n_random], hard=feature.hard[:n_hard])
    kinds = [question.kind for question in scoring.detection_questions(few, 0)]
    assert tuple(map(kinds.count, ("held_out", "random", "hard"))) == expected


def test_a_feature_without_passages_to_judge_has_no_questions(feature):
    assert scoring.detection_questions(feature._replace(held_out=()), 0) == []
    assert scoring.detection_questions(feature._replace(random=(), hard=()), 0) == []
    assert scoring.fuzzing_questions(feature._replace(held_out=()), 0) == [[], []]
    assert scoring.batches([], 8) == []


def test_how_many_passages_of_a_batch_are_active_cannot_be_known():
    counts = set()
    for index in range(20):
        questions = scoring.detection_questions(make_feature(index, on(" self")), 0)
        counts |= {sum(q.truth for q in batch) for batch in scoring.batches(questions, 8)}
    assert len(counts) >= 5


def test_the_order_is_drawn_by_seed_and_feature(feature):
    def order(feature, seed):
        return [(q.kind, q.index) for q in scoring.detection_questions(feature, seed)]

    assert order(feature, 0) == order(feature, 0)
    assert order(feature, 0) != order(feature, 1)
    assert order(feature, 0) != order(feature._replace(feature=4), 0)


def test_ids_differ_and_tell_nothing(feature):
    ids = scoring.opaque_ids(feature, 0, "detection", 500)
    assert len(set(ids)) == 500
    assert all(len(id) == 3 and set(id) <= set(scoring.LETTERS) for id in ids)
    assert ids != sorted(ids)
    assert scoring.opaque_ids(feature, 0, "detection", 3) == ids[:3]
    assert scoring.opaque_ids(feature, 0, "fuzzing", 3) != ids[:3]


def rights_and_wrongs(feature, seed=0):
    """The questions of each passage of which marks are asked, the right one first."""
    rounds = scoring.fuzzing_questions(feature, seed)
    pairs = zip(*(sorted(questions, key=lambda q: q.index) for questions in rounds), strict=True)
    return [sorted(pair, key=lambda q: not q.truth) for pair in pairs]


def test_wrong_marks_are_the_right_ones_moved_as_a_whole_to_silent_tokens(feature):
    pairs = rights_and_wrongs(feature)
    assert len(pairs) > 12
    for right, wrong in pairs:
        assert (right.truth, wrong.truth) == (True, False)
        assert right.passage == wrong.passage == feature.held_out[right.index]
        active = {i for i, activation in enumerate(right.passage.activations) if activation > 0}
        assert right.marked == active
        shift = min(wrong.marked) - min(active)
        assert wrong.marked == {i + shift for i in active}
        assert not wrong.marked & active
        assert wrong.marked <= set(range(len(wrong.passage.tokens)))
    for index in set(range(20)) - {right.index for right, _ in pairs}:
        values = feature.held_out[index].activations
        active, silent = ({i for i, value in enumerate(values) if (value > 0) == fires} for fires in (True, False))
        assert not any({i + shift for i in active} <= silent for shift in range(-len(values), len(values)))


def test_both_marks_of_a_passage_are_asked_in_different_rounds_and_orders(feature):
    rounds = scoring.fuzzing_questions(feature, 0)
    orders = [[q.index for q in questions] for questions in rounds]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(set(orders[0]))
    assert orders[0] != orders[1]
    assert all(order != sorted(order) for order in orders)
    assert all(0 < sum(q.truth for q in questions) < len(questions) for questions in rounds)
    assert rounds == scoring.fuzzing_questions(feature, 0) != scoring.fuzzing_questions(feature, 1)


def at(peaks, length):
    """A passage that is active on some of its tokens, most on the first of them."""
    activations = {peak: 2.0 if peak == min(peaks) else 1.0 for peak in peaks}
    return Example("d", 1, tuple("x" * length), tuple(activations.get(i, 0.0) for i in range(length)))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([at({3}, 20)], {3, 4, 6}),
        ([at({11}, 20)], {14, 15, 17}),  # from 7 to 13 one would be on an active token
        ([at({12}, 40), at({2}, 20)], {2, 3, 5}),  # of the passage that is about as long
        ([at({35}, 40), at({2}, 20)], {2, 3, 5}),
        ([at({0}, 40)], {0, 1, 3}),  # not the place that is nearest to its own
    ],
)
def test_wrong_marks_have_their_peak_near_to_where_another_passage_has_it(feature, others, expected):
    passage, misses = at({10, 11, 13}, 20), set()
    for seed in range(30):
        (_, wrong), *_ = rights_and_wrongs(feature._replace(held_out=(passage, *others)), seed)
        miss = min(wrong.marked) - min(expected)
        assert wrong.marked == {i + miss for i in expected}
        misses.add(miss)
    assert 0 in misses
    assert misses <= set(range(-scoring.SLACK, scoring.SLACK + 1))


@pytest.mark.parametrize(("right", "wrongs"), [("q", {3, 4}), ("e", {2})])
def test_marked_tokens_stand_unmarked_elsewhere_as_often_in_wrong_as_in_right_marks(feature, right, wrongs):
    tokens = ("e", "e", "e", "b", "c", "d", "e", "e", "e", "e", " " + right, "e", "e")
    passage = Example("d", 1, tokens, tuple(2.0 * (i == 10) for i in range(len(tokens))))
    found = set()
    for seed in range(30):
        (_, wrong), *_ = rights_and_wrongs(feature._replace(held_out=(passage, at({3}, len(tokens)))), seed)
        found |= wrong.marked
    assert found == wrongs


def test_a_passage_in_which_its_marks_fit_nowhere_else_is_left_out(feature):
    dense = Example("d", 1, ("a", "b", "c"), (1.0, 1.0, 0.0))
    tight = Example("d", 1, ("a", "b", "c", "d"), (1.0, 0.0, 1.0, 0.0))
    wide = Example("d", 1, ("a", "b", "c", "d"), (1.0, 0.0, 0.0, 1.0))
    rounds = scoring.fuzzing_questions(feature._replace(held_out=(dense, tight, wide)), 0)
    assert [[q.index for q in questions] for questions in rounds] == [[1], [1]]
    wrong = next(q for questions in rounds for q in questions if not q.truth)
    assert wrong.marked == {1, 3}


def test_batches_are_few_and_about_equal():
    assert [len(batch) for batch in scoring.batches(list(range(20)), 8)] == [6, 7, 7]
    assert [x for batch in scoring.batches(list(range(20)), 8) for x in batch] == list(range(20))


def test_simulation_asks_for_all_intervals_and_both_kinds_of_negatives(feature):
    passages = scoring.simulation_passages(feature)
    assert [any(p.activations) for p in passages] == [True] * 4 + [False] * 4
    assert {p.interval(feature.maximum) for p in passages[:4]} == {0, 1, 2, 3}
    assert sum(p in feature.hard for p in passages[4:]) == 2


def test_a_simulation_asks_neither_for_the_strongest_nor_for_the_weakest_of_all(feature):
    passages = scoring.simulation_passages(feature)
    assert passages[:4] == [feature.held_out[i] for i in (2, 7, 12, 17)]
    assert scoring.simulation_passages(feature._replace(held_out=feature.held_out[:3]))[:3] == [*feature.held_out[:3]]


@pytest.mark.parametrize(
    ("n_random", "n_hard", "expected"),
    [(10, 1, (3, 1)), (1, 10, (1, 3)), (0, 10, (0, 4)), (10, 0, (4, 0)), (1, 2, (1, 2))],
)
def test_a_simulation_takes_more_of_one_kind_of_negatives_where_the_other_is_short(feature, n_random, n_hard, expected):
    few = feature._replace(random=feature.random[:n_random], hard=feature.hard[:n_hard])
    silent = scoring.simulation_passages(few)[4:]
    assert len(set(silent)) == len(silent)
    assert (sum(p in few.random for p in silent), sum(p in few.hard for p in silent)) == expected


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10])
def test_every_explained_feature_has_another_one_for_a_baseline(n):
    features = [7 * i for i in range(n)]
    others = scoring.other_features(reversed(features))
    assert sorted(others) == sorted(others.values()) == (features if n > 1 else [])
    assert all(other != feature for feature, other in others.items())


def test_one_explained_feature_more_changes_the_baselines_of_hardly_any():
    few = scoring.other_features(range(0, 200, 2))
    for added in (1, 57, 199, 10_000):
        more = scoring.other_features([*range(0, 200, 2), added])
        assert sum(more[feature] != other for feature, other in few.items()) == 1


def test_a_baseline_is_of_any_other_feature_near_or_far():
    distances = np.array([abs(other - feature) for feature, other in scoring.other_features(range(1000)).items()])
    assert distances.mean() == pytest.approx(1000 / 3, rel=0.1)  # as of two places drawn evenly
    assert np.bincount(distances).max() < 10


def test_the_token_a_feature_is_strongest_on_is_the_peak_of_its_first_passage(feature):
    assert scoring.strongest_token(feature) == " self"


# What answers are worth


def test_balanced_accuracy_is_the_mean_of_both_shares_of_right_answers():
    assert scoring.verdict_score(judgements(10, 0, 10, 0), 0).value == 1.0
    assert scoring.verdict_score(judgements(0, 10, 0, 10), 0).value == 0.0
    assert scoring.verdict_score(judgements(20, 0, 0, 5), 0).value == 0.5  # always yes, whatever the balance
    assert scoring.verdict_score(judgements(3, 1, 5, 5), 0).value == pytest.approx((0.75 + 0.5) / 2)


def test_what_was_not_answered_counts_neither_for_nor_against():
    answered, partly = judgements(3, 1, 5, 5), judgements(3, 1, 5, 5, unanswered=30)
    assert scoring.verdict_score(partly, 0).value == scoring.verdict_score(answered, 0).value
    score = scoring.verdict_score(partly, 0)
    assert (score.answered, score.unanswered) == (14, 30)


def test_without_answers_of_both_kinds_there_is_no_score():
    assert scoring.verdict_score(judgements(5, 5, 0, 0), 0).value is None
    score = scoring.verdict_score(judgements(0, 0, 0, 0, unanswered=4), 0)
    assert (score.value, score.low, score.high, score.answered, score.unanswered) == (None, None, None, 0, 4)


def test_the_interval_is_that_of_the_binomial_for_many_independent_passages():
    low, high = accuracy_interval(judgements(280, 120, 360, 40), seed=0)
    spread = 1.96 * np.sqrt((0.7 * 0.3 + 0.9 * 0.1) / 400) / 2
    assert (low, high) == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.006)
    assert accuracy_interval(judgements(280, 120, 360, 40), seed=0) == (low, high)
    assert accuracy_interval(judgements(280, 120, 360, 40), seed=1) != (low, high)


def test_both_judgements_of_a_passage_are_resampled_together():
    fuzzing = [
        Judgement("fuzzing", "held_out", i, truth, (i % 2 == 0) == truth) for i in range(40) for truth in (True, False)
    ]
    low, high = accuracy_interval(fuzzing, seed=0)  # passages are all right or all wrong: 40 items, not 80
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), rel=0.15)


def test_recall_is_by_the_interval_of_the_passage(feature):
    found = [
        Judgement("detection", "held_out", i, True, passage.interval(feature.maximum) >= 2)
        for i, passage in enumerate(feature.held_out)
    ]
    assert scoring.recall(feature, found) == (0.0, 0.0, 1.0, 1.0)
    silent = [
        j._replace(verdict=None) if feature.held_out[j.index].interval(feature.maximum) == 3 else j for j in found
    ]
    assert scoring.recall(feature, [*silent, Judgement("detection", "random", 0, False, True)]) == (0.0, 0.0, 1.0, None)


def test_correlation_and_r2_are_those_of_numpy_over_all_tokens():
    generator = np.random.default_rng(0)
    truth = generator.gamma(1.0, size=(6, 30))
    predicted = 0.5 * truth + 0.2 * generator.normal(size=truth.shape)
    simulated = [Simulated(x, y) for x, y in zip(truth, predicted, strict=True)]
    score = scoring.simulation_score(simulated, 6, seed=0)
    assert score.value == pytest.approx(np.corrcoef(truth.ravel(), predicted.ravel())[0, 1])
    assert score.r2 == pytest.approx(1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_a_perfect_simulation_has_one_and_a_constant_one_zero():
    def r_and_r2(*simulated):
        score = scoring.simulation_score(simulated, len(simulated), seed=0)
        return score.value, score.r2

    truth = [0.0, 3.0, 0.0, 1.0]
    assert r_and_r2(Simulated(truth, truth)) == (pytest.approx(1), pytest.approx(1))
    assert r_and_r2(Simulated(truth, [0.1] * 4))[0] == 0.0
    assert r_and_r2(Simulated([0.1] * 4, truth)) == r_and_r2() == (None, None)


def test_a_simulation_score_counts_the_passages_it_did_not_get():
    truth = [0.0, 3.0, 0.0, 1.0]
    score = scoring.simulation_score([Simulated(truth, [0.0, 2.0, 1.0, 1.0]), Simulated(truth, truth)], 5, seed=0)
    assert (score.answered, score.unanswered) == (2, 3)
    assert score.low <= score.value <= score.high
    assert score.low < score.high
    assert scoring.simulation_score([], 3, seed=0)[:3] == (None, None, None)


def test_the_interval_of_a_correlation_is_fishers_for_many_independent_passages():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=400)
    simulated = [
        Simulated([x], [y]) for x, y in zip(truth, 0.6 * truth + 0.8 * generator.normal(size=400), strict=True)
    ]
    r = scoring.simulation_score(simulated, 400, seed=0).value
    low, high = correlation_interval(simulated, seed=0)
    expected = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.96 / np.sqrt(400 - 3))
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02)
    assert correlation_interval(simulated, seed=0) == (low, high)
    assert correlation_interval(simulated, seed=1) != (low, high)


def test_passages_are_resampled_whole():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=100)
    few = [Simulated([x], [y]) for x, y in zip(truth, truth + generator.normal(size=100), strict=True)]
    repeated = [Simulated(each.true * 50, each.predicted * 50) for each in few]
    assert correlation_interval(repeated, 0) == pytest.approx(correlation_interval(few, 0))
