"""Features and a completer -> labels: explain, repair, score, compare with baselines. No torch, no network.

    explanations = await explain_all(indices, load, completer)
    labels = await score_all(explanations, load, completer, explainer=model, seed=SEED)

Two passes, since the baseline of one feature's scores is another one's explanation. Every request is a function of the
features' records and the settings alone, so a completer with a journal answers those of an earlier run from it. What
goes wrong with one feature is a status; an exception of the completer's ends the pass and is raised.
"""

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mistral_sae.explain import prompts, scoring
from mistral_sae.explain.scoring import METHODS
from mistral_sae.explain.types import (
    STATUSES,
    Completer,
    Example,
    Explanation,
    Feature,
    Judgement,
    Label,
    Question,
    Request,
    Score,
    Status,
    unexplained,
    without_passages,
)

BASELINES = {"other_feature": " of another feature's explanation", "top_token": " of the top token"}
BATCH = 8  # passages to judge in one request
IN_FLIGHT = 64  # features at work at a time: each is in memory then, and has one request or some tens of them waiting
FEWEST_EXAMPLES = 2  # to which the examples are halved while the prompt is too long

Result = TypeVar("Result", Explanation, Label)


class Answer(NamedTuple):
    """What was read in a reply, or why nothing was."""

    status: Status
    value: Any = None  # None unless the status is "ok"
    reason: str = ""  # one line


async def explain(feature: Feature, completer: Completer) -> Explanation:
    """Ask for an explanation: with fewer examples where the prompt is too long, once more where it cannot be read.

    One that is too long is asked for once more, too. If it stays too long it is cut, and the reason says so: its scores
    are then those of what is left.
    """
    if not feature.top:
        return without_passages(feature)
    n_top, n_spread = min(prompts.TOP, len(feature.top)), min(prompts.SPREAD, len(feature.spread))
    while True:
        request = prompts.explain_request(feature, n_top, n_spread)
        answer = await _ask(completer, request, prompts.read_explanation)
        if answer.status != "overflow" or n_top + n_spread <= FEWEST_EXAMPLES:
            break
        n_top, n_spread = max(1, n_top // 2), max(min(1, n_spread), n_spread // 2)
    if answer.value == prompts.NO_PATTERN:
        return Explanation(feature.feature, prompts.NO_PATTERN, reason="the explainer found none")
    return Explanation(feature.feature, answer.status, answer.value or "", answer.reason)


async def score(
    feature: Feature,
    explanation: Explanation,
    other: Explanation | None,
    completer: Completer,
    *,
    explainer: str,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> Label:
    """Return the label of a feature: its explanation's scores, and those of `other` and of its top token to compare.

    An explanation of another status than "ok" is not scored. Requests without an answer are counted in the scores,
    and the label's reason names their statuses, those of the baselines' requests too.
    """
    if explanation.status != "ok":
        return unexplained(explanation, explainer)
    texts = {
        "own": explanation.text,
        "other_feature": other.text if other else "",
        "top_token": f"the token {prompts.quoted(scoring.strongest_token(feature))}",
    }
    distinct = list(dict.fromkeys(filter(None, texts.values())))  # two that say the same are asked once
    outcomes = await asyncio.gather(
        *(_score(method, feature, text, completer, seed) for method in methods for text in distinct)
    )
    found = dict(zip(itertools.product(methods, distinct), outcomes, strict=True))
    scores: dict[str, Score] = {}
    judgements: list[Judgement] = []
    reasons = [explanation.reason] if explanation.reason else []
    for method in methods:
        by_name = {name: found[method, text][0] for name, text in texts.items() if text}
        other_feature = by_name["other_feature"].value if other else None
        scores[method] = by_name["own"]._replace(other_feature=other_feature, top_token=by_name["top_token"].value)
        judgements += found[method, explanation.text][1]
        for name, each in by_name.items():
            of, total = f"{method}{BASELINES.get(name, '')}", sum(dict(each.requests).values())
            reasons += [f"{of}: {n} of {total} requests {status}" for status, n in each.requests if status != "ok"]
    return Label(feature.feature, explanation.text, explainer, "ok", scores, tuple(judgements), "; ".join(reasons))


async def explain_all(
    features: Iterable[int],
    load: Callable[[int], Feature],
    completer: Completer,
    *,
    in_flight: int = IN_FLIGHT,
    after_each: Callable[[], object] = lambda: None,
) -> dict[int, Explanation]:
    """Return explanations of features, ascending; `load` gives a feature's record when its turn has come."""
    return await _for_each(features, lambda index: explain(load(index), completer), in_flight, after_each)


async def score_all(
    explanations: Mapping[int, Explanation],
    load: Callable[[int], Feature],
    completer: Completer,
    *,
    explainer: str,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    in_flight: int = IN_FLIGHT,
    after_each: Callable[[], object] = lambda: None,
) -> dict[int, Label]:
    """Return labels, one for each explanation, ascending."""
    others = scoring.other_features(index for index, explanation in explanations.items() if explanation.status == "ok")

    async def work(index: int) -> Label:
        explanation = explanations[index]
        if explanation.status != "ok":  # whose record need not be made
            return unexplained(explanation, explainer)
        other = explanations[others[index]] if index in others else None
        return await score(load(index), explanation, other, completer, explainer=explainer, methods=methods, seed=seed)

    return await _for_each(explanations, work, in_flight, after_each)


async def _for_each(
    features: Iterable[int], work: Callable[[int], Awaitable[Result]], in_flight: int, after_each: Callable[[], object]
) -> dict[int, Result]:
    """What `work` returns for each feature, with at most `in_flight` at work at a time."""
    waiting, results = iter(features), {}

    async def worker() -> None:
        for feature in waiting:
            results[feature] = await work(feature)
            after_each()

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return dict(sorted(results.items()))


# ---- what came of it ----


def has_failed(label: Label) -> bool:
    """Return whether a label lacks its explanation, or most answers to one of its scorers, though the budget sufficed.

    A feature without passages to be explained from, or without a pattern, as the explainer says, lacks nothing.
    """
    in_vain = [score for score in label.scores.values() if score.answered < score.unanswered]
    statuses = [label.status, *(status for score in in_vain for status, _ in score.requests)]
    return any(STATUSES[status].is_failure for status in statuses)


def is_worth_asking_again(label: Label) -> bool:
    """Return whether the next run may get an answer that this label lacks."""
    statuses = [label.status, *(status for score in label.scores.values() for status, _ in score.requests)]
    return any(STATUSES[status].ask_again for status in statuses)


def summary(labels: Collection[Label]) -> list[str]:
    """Return lines for people: labels by status, requests for scores that got no answer, and mean scores.

    All but the last are of the features that were asked for; that is of those explained beside them.
    """
    beside = [label for label in labels if label.is_beside]
    labels = [label for label in labels if not label.is_beside]
    statuses = Counter(label.status for label in labels)
    asked: Counter[Status] = Counter()
    unscored = 0
    for label in labels:
        unscored += any(not score.answered for score in label.scores.values())
        for score in label.scores.values():
            asked.update(dict(score.requests))
    lack = f"; {unscored:,} of the ok ones lack a score" if unscored else ""
    lines = [f"{len(labels):,} features: {_counts(statuses)}{lack}"]
    total, answered = asked.total(), asked.pop("ok", 0)
    if total > answered:
        lines.append(f"of {total:,} requests for the scores {_counts(asked)}: what these asked for counts neither way")
    for each in scoring.summarize_scores(label.scores for label in labels):
        value, other_feature, top_token = (
            "none" if mean is None else f"{round(mean, 2) + 0.0:.2f}"  # not -0.00
            for mean in (each.value, each.other_feature, each.top_token)
        )
        over = f" (over {each.features:,} features)" if each.features < statuses["ok"] else ""
        baselines = f"another feature's explanation {other_feature}, its top token {top_token}"
        lines.append(f"  {each.method:10} {value}   {baselines}{over}")
    if beside:
        means = [f"{each.method} {each.value:.2f}" for each in scoring.summarize_scores(b.scores for b in beside)]
        lines.append(f"beside them {len(beside):,} that tell a concept best of all: {', '.join(means)}")
    return lines


def _counts(statuses: Counter[Status]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in statuses.most_common())


# ---- requests ----


async def _score(
    method: str, feature: Feature, explanation: str, completer: Completer, seed: int
) -> tuple[Score, list[Judgement]]:
    if method == "detection":
        questions = scoring.detection_questions(feature, seed)
        score, judgements = await _judge(method, [questions], explanation, completer, seed)
        return score._replace(recall=scoring.recall(feature, judgements)), judgements
    if method == "fuzzing":
        return await _judge(method, scoring.fuzzing_questions(feature, seed), explanation, completer, seed)
    return await _simulate(feature, explanation, completer, seed), []


async def _judge(
    method: str, rounds: Sequence[Sequence[Question]], explanation: str, completer: Completer, seed: int
) -> tuple[Score, list[Judgement]]:
    """Ask for verdicts in batches that mix no rounds, smaller ones where they are too long for the model."""
    make_request = prompts.detection_request if method == "detection" else prompts.fuzzing_request

    async def ask(batch: Sequence[Question]) -> list[Answer]:
        ids = {question.id for question in batch}
        answer = await _ask(
            completer, make_request(explanation, batch), lambda reply: prompts.read_verdicts(reply, ids)
        )
        if answer.status == "overflow" and len(batch) > 1:
            return await ask_all(scoring.batches(batch, math.ceil(len(batch) / 2)))
        return [answer]

    async def ask_all(batches: Iterable[Sequence[Question]]) -> list[Answer]:
        return list(itertools.chain(*await asyncio.gather(*map(ask, batches))))

    answers = await ask_all(batch for questions in rounds for batch in scoring.batches(questions, BATCH))
    verdicts = {id: verdict for answer in answers if answer.status == "ok" for id, verdict in answer.value.items()}
    judgements = [
        Judgement(method, question.kind, question.index, question.truth, verdicts.get(question.id))
        for question in itertools.chain(*rounds)
    ]
    return scoring.verdict_score(judgements, seed)._replace(requests=_by_status(answers)), judgements


async def _simulate(feature: Feature, explanation: str, completer: Completer, seed: int) -> Score:
    async def ask(passage: Example) -> Answer:
        request = prompts.simulation_request(explanation, passage)
        return await _ask(completer, request, lambda reply: prompts.read_activations(reply, len(passage.tokens)))

    passages = scoring.simulation_passages(feature)
    answers = await asyncio.gather(*map(ask, passages))
    unit = feature.maximum / prompts.LEVELS
    simulated = [
        scoring.Simulated(passage.activations, [unit * level for level in answer.value])
        for passage, answer in zip(passages, answers, strict=True)
        if answer.status == "ok"
    ]
    return scoring.simulation_score(simulated, len(passages), seed)._replace(requests=_by_status(answers))


async def _ask(completer: Completer, request: Request, read: Callable[[str], Any]) -> Answer:
    """What `read` finds in the reply, or in that to one repair request; the status of whichever has none."""
    completion = await completer.complete(request)
    problems: list[prompts.Unreadable] = []
    while completion.status == "ok" and len(problems) < 2:
        try:
            return Answer("ok", read(completion.text))
        except prompts.Unreadable as error:
            problems.append(error)
        if len(problems) == 1:
            completion = await completer.complete(prompts.repair_request(request, completion.text, str(problems[0])))
    for problem in reversed(problems):
        if isinstance(problem, prompts.TooLong):
            return Answer("ok", problem.beginning, f"cut to {prompts.MAX_WORDS} words: {problem}")
    if completion.status == "ok":
        last = prompts.quoted(" ".join(completion.text.split())[:80])
        return Answer("unparsed", reason=f"{problems[-1]}, in two attempts; the last reply is {last}")
    text = f"the reply does not end: {completion.text}" if completion.status == "truncated" else completion.text
    return Answer(completion.status, reason=" ".join(text.split())[:300])


def _by_status(answers: Iterable[Answer]) -> tuple[tuple[Status, int], ...]:
    return tuple(Counter(answer.status for answer in answers).items())
