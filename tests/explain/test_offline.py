import random
import time

import numpy as np
import pytest
from synthetic_features import WORDS, make_feature, on

from mistral_sae.explain import offline
from mistral_sae.explain.offline import ANY, Rule
from mistral_sae.explain.types import Example, Explanation


def fires_on_self_after_parenthesis(tokens, i):
    return 4.0 if tokens[i] == " self" and i > 0 and tokens[i - 1] == "(" else 0.0


def fires_on_if_lines(tokens, i):
    lines = "".join(tokens[:i]).rsplit("\n", 1)
    return 2.0 + i % 3 if lines[1:] and lines[1].split()[:1] == ["if"] else 0.0


def fires_before_items(tokens, i):
    return 3.0 if i + 1 < len(tokens) and tokens[i + 1] == "items" else 0.0


def passage(text_tokens, start=20):
    return Example("d", start, tuple(text_tokens), (0.0,) * len(text_tokens))


def names(parts, kind):
    return [[value for k, value in each.contexts if k == kind] for each in parts]


# What can be said of a token


def test_contexts_say_where_a_token_stands():
    tokens = ["\n", "def", " area", "_of", "(self", "):", " #", " why", "\n", "    ", '"', "a", "'b", '"', " c"]
    parts = offline.parts_of(passage(tokens))
    assert all(each.contexts[0] == each.targets[0] == ANY for each in parts)
    assert names(parts, "after")[4] == ["_of", "area_of"]
    assert names(parts, "continuing")[3:5] == [["area"], []]
    assert names(parts, "line")[2:5] == [["def"]] * 3
    assert [i for i, starting in enumerate(names(parts, "starting")) if starting] == [1, 9, 10]
    assert names(parts, "before")[6] == ["why"]
    assert [i for i, early in enumerate(names(offline.parts_of(passage(tokens, start=5)), "early")) if early] == [
        0,
        1,
        2,
        3,
    ]


def test_a_word_goes_on_in_the_next_token_but_not_over_a_line_break():
    tokens = ["Tab", "", "le", "\n", "row", "  ", "x", "_1", "(2", "3"]
    where = names(offline.parts_of(passage(tokens)), "continuing")
    assert where == [[], [], ["Tab"], [], [], [], [], ["x"], [], ["2"]]
    classes = [dict(each.targets[1:])["class"] for each in offline.parts_of(passage(tokens))]
    assert classes[2] == "word parts"
    assert classes[4] == "words"


@pytest.mark.parametrize(
    ("token", "continues", "expected"),
    [
        (" self", False, "words"),
        ("elf", True, "word parts"),
        (" 12", False, "numbers"),
        (" ==", False, "punctuation"),
        (".join", False, "words with punctuation"),
        ("    ", False, "indentation"),
        ("  \n", False, "line breaks"),
    ],
)
def test_every_token_is_of_one_class(token, continues, expected):
    assert offline.class_of(token, continues) == expected


@pytest.mark.parametrize("token", [" a b", "\n\t", '"""', "it's", "\"'", "\u00a0\\n", "\x00"])
def test_a_token_in_a_phrase_has_no_white_space_and_is_told_from_others(token):
    shown = offline.shown(token)
    assert len(shown.split()) == 1
    assert shown.isprintable()
    assert shown[0] == shown[-1]
    assert shown != offline.shown(token + " ")


# What is found


def test_a_token_is_found_and_its_context_if_it_has_one():
    bare = offline.find(make_feature(0, on(" self")))
    assert bare.explanation.text == '"self"'
    after = offline.find(make_feature(1, fires_on_self_after_parenthesis))
    assert after.explanation.text == '"self" after "("'
    assert [rule[:2] for rule in after.rules] == [(("core", "self"), ("after", "("))]


def test_several_tokens_of_one_context_are_named_together():
    def fires(tokens, i):
        return 2.0 if tokens[i] in (" self", " name", " x") else 0.0

    found = offline.find(make_feature(2, fires, [*WORDS, *(f" w{i}" for i in range(100))]))
    *most, last = found.explanation.text.split(" or ")
    assert {'"self"', '"name"', '"x"'} == {last, *most[0].split(", ")}


def test_a_feature_of_some_lines_and_one_of_what_comes_next_are_found():
    lines = offline.find(make_feature(3, fires_on_if_lines))
    assert lines.explanation.text == 'what comes after "if" in its line'
    before = offline.find(make_feature(4, fires_before_items))
    assert before.explanation.text == 'tokens before "items"'


def test_what_comes_next_is_no_evidence_unless_the_feature_promotes_it():
    feature = make_feature(4, fires_before_items)._replace(promoted=((" if", 1.0),))
    assert "before" not in offline.find(feature).explanation.text


def test_a_feature_of_unrelated_tokens_has_no_pattern():
    generator = random.Random(0)
    words = [f" w{i}" for i in range(4000)]
    lone = [
        Example(f"d{n}", 20, tuple(generator.sample(words, 24)), (0.0,) * 20 + (3.0,) + (0.0,) * 3) for n in range(30)
    ]
    feature = make_feature(5, on(" self"))
    found = offline.find(feature._replace(top=tuple(lone[:10]), spread=tuple(lone[10:]), maximum=3.0))
    assert (found.explanation[1:3], found.rules) == (("no pattern", ""), ())
    label = offline.label(feature, found, None)
    assert (label.status, label.explanation, label.scores) == ("no pattern", "", {})
    assert label.reason


def test_a_dead_feature_is_dead():
    feature = make_feature(0, on(" self"))._replace(top=(), spread=(), held_out=(), maximum=0.0)
    label = offline.label(feature, offline.find(feature), None)
    assert (label.status, label.explainer, label.scores) == ("dead", "offline", {})


def test_a_feature_that_fires_only_in_scored_documents_is_rare_and_not_dead():
    feature = make_feature(0, on(" self"))._replace(top=(), spread=())
    label = offline.label(feature, offline.find(feature), None)
    assert (label.status, label.scores) == ("rare", {})
    assert "never" not in label.reason


def test_a_phrase_has_at_most_25_words_however_much_there_is_to_say():
    def example(n):
        tokens = [f" w{i}" for i in range(30)]
        tokens[n % 30 : n % 30] = [f"v{n % 30}"]
        return Example(f"d{n}", 20, tuple(tokens), tuple(2.0 if i == n % 30 + 1 else 0.0 for i in range(31)))

    feature = make_feature(6, on(" self"))._replace(top=tuple(map(example, range(90))), spread=(), maximum=2.0)
    found = offline.find(feature)
    assert 15 < len(found.explanation.text.split()) <= 25
    assert 3 < len(found.rules) < 30
    for rule in found.rules:
        assert offline.shown(rule.context[1]) in found.explanation.text


def test_only_the_explaining_examples_are_looked_at():
    feature = make_feature(1, fires_on_self_after_parenthesis)
    assert offline.find(feature) == offline.find(feature._replace(held_out=(), random=(), hard=(), nearest=((1, 0.5),)))
    other = make_feature(2, on(" 1"))
    assert offline.find(feature._replace(top=other.top, spread=other.spread)).explanation.text == '"1"'


def test_all_intervals_count_the_same_however_many_passages_they_have():
    strong = [Example(f"s{n}", 20, (" a", " x", " b"), (0.0, 8.0, 0.0)) for n in range(18)]
    weak = [Example(f"w{n}", 20, (" a", " y", " b"), (0.0, 1.0, 0.0)) for n in range(2)]
    feature = make_feature(0, on(" self"))._replace(top=tuple(strong), spread=tuple(weak), maximum=8.0)
    candidates = offline.tabulate([*strong, *weak], feature)
    rules = [rule for rule in candidates.rules if rule[:2] == (("core", "y"), ANY)]
    assert candidates.share(rules) == pytest.approx(0.5)


# The predictor


def test_the_predictor_says_what_the_phrase_says():
    rules = [Rule(("core", "self"), ("after", "("), 0.5), Rule(("class", "numbers"), ANY, 0.25)]
    parts = offline.parts_of(passage(["(", "self", " self", " 12", "("]))
    assert offline.predict(rules, parts) == [0.0, 0.5, 0.0, 0.25, 0.0]
    assert offline.phrase(rules) == '"self" after "("; numbers'


def test_what_a_feature_is_weak_on_is_said_last_and_called_weak():
    rules = [Rule(("core", "a"), ANY, 0.1), Rule(("core", "b"), ANY, 0.9), Rule(("core", "c"), ANY, 0.5)]
    assert offline.phrase(rules) == '"b" or "c"; weakly "a"'


def test_a_concept_is_what_is_known_of_a_token_and_gives_no_answer_where_nothing_is():
    rules = [Rule(("concept", "numbers"), ANY, 0.25)]
    assert offline.phrase(rules) == "numbers"
    known = passage(["x", "1"])._replace(concepts=((), ("tokens in strings", "numbers")))
    assert offline.predict(rules, offline.parts_of(known)) == [0, 0.25]
    feature = make_feature(1, on(" 1"))
    (first, *rest) = feature.held_out
    first = first._replace(concepts=tuple(("numbers",) if value else () for value in first.activations))
    found = offline.Found(Explanation(1, "ok", "numbers"), rules)
    (label,) = offline.score_all({1: found}, lambda _: feature._replace(held_out=(first, *rest)))
    assert [(j.kind, j.index, j.verdict) for j in label.judgements] == [("held_out", 0, True)]
    for score in label.scores.values():
        assert (score.answered, score.unanswered) == (1, 2 * len(feature.held_out) - 1)


def test_rules_of_one_target_share_their_contexts_and_no_other_rule_is_implied():
    rules = [Rule(("core", "a"), ("after", "x"), 1), Rule(("core", "b"), ("after", "y"), 1)]
    assert offline.phrase(rules) == '"a" after "x"; "b" after "y"'
    rules = [Rule(ANY, ("after", "x"), 1), Rule(ANY, ("after", "y"), 1), Rule(ANY, ("early", ""), 1)]
    assert offline.phrase(rules) == 'what comes after "x" or "y"; tokens near the start of the text'


def test_strengths_are_mean_activations_as_shares_of_the_maximum():
    feature = make_feature(1, fires_on_self_after_parenthesis)
    (rule,) = offline.find(feature).rules
    assert rule.strength == pytest.approx(1.0)
    twice = feature._replace(maximum=8.0)
    assert offline.find(twice).rules[0].strength == pytest.approx(0.5)


def test_rules_are_scored_on_held_out_passages_beside_both_baselines():
    features = {
        0: make_feature(0, fires_on_self_after_parenthesis),
        1: make_feature(1, on(" 1")),
        2: make_feature(2, fires_on_if_lines),
    }
    # Hard negatives: the token without the parenthesis
    hard = tuple(passage([" x", " self", " ="]) for _ in range(10))
    features[0] = features[0]._replace(hard=hard)
    found = {index: offline.find(feature) for index, feature in features.items()}
    labels = {label.feature: label for label in offline.score_all(found, features.__getitem__)}
    assert list(labels) == [0, 1, 2]
    label = labels[0]
    assert (label.status, label.explainer, label.explanation) == ("ok", "offline", '"self" after "("')
    detection, simulation = label.scores["detection"], label.scores["simulation"]
    assert (detection.value, detection.low, detection.high) == (1.0, 1.0, 1.0)
    assert simulation.value == pytest.approx(1.0)
    assert simulation.r2 == pytest.approx(1.0)
    negatives = [getattr(features[0], j.kind)[j.index] for j in label.judgements if not j.truth]
    assert detection.top_token == pytest.approx(0.5 + 0.5 * np.mean([" self" not in p.tokens for p in negatives]))
    assert detection.top_token < 0.9
    assert detection.other_feature < 0.7
    assert simulation.other_feature < 0.2
    assert detection.answered == simulation.answered == len(label.judgements) == 2 * len(features[0].held_out)
    assert detection.unanswered == 0
    assert set(detection.recall) == {None, 1.0}  # it always fires at its maximum
    for judgement in label.judgements:
        example = getattr(features[0], judgement.kind)[judgement.index]
        assert judgement.truth == judgement.verdict == any(example.activations)


def test_labels_are_the_same_whenever_they_are_made():
    features = {i: make_feature(i, on(token)) for i, token in enumerate([" self", " 1", " x"])}

    def labels():
        return list(offline.score_all({i: offline.find(f) for i, f in features.items()}, features.__getitem__))

    assert labels() == labels()


def test_finding_takes_milliseconds():
    words = [f" w{i}" for i in range(500)]
    feature = make_feature(7, lambda tokens, i: 1.0 if tokens[i][-1] == "7" else 0.0, words, length=64)
    start = time.process_time()
    offline.find(feature)
    assert time.process_time() - start < 0.5


def test_rules_come_from_passages_of_the_whole_range_and_not_the_strongest_alone():
    weak = on(" name")
    feature = make_feature(4, lambda tokens, i: 8.0 if tokens[i] == " self" else 0.25 * weak(tokens, i))
    assert all(passage.tokens[passage.peak] == " self" for passage in feature.top)
    targets = {rule.target[1] for rule in offline.find(feature).rules}
    assert {"self", "name"} <= {target.strip() for target in targets}
    alone = {rule.target[1] for rule in offline.find(feature._replace(spread=())).rules}
    assert "name" not in {target.strip() for target in alone}
