"""Features and a completer -> labels: explain, repair, score, beside the baselines. No torch, no network.

    explanations = {e.feature: e async for e in explain_all(indices, load, completer)}
    async for label in score_all(explanations, load, completer, explainer=model, seed=SEED): ...

Two passes, since the baseline of one feature's scores is another one's explanation. Every request is a function of the
features' records and the settings alone, so a completer with a journal answers those of an earlier run from it. What
goes wrong with one feature is a status; an exception of the completer's ends the pass and is raised.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from mistral_sae.explain import answers, prompts, scoring
from mistral_sae.explain.scoring import METHODS
from mistral_sae.explain.types import (
    STATUSES,
    Completer,
    Explanation,
    Feature,
    Judgement,
    Label,
    Request,
    Score,
    unexplained,
    without_passages,
)

BASELINES = {"other_feature": "another feature's explanation", "top_token": "the top token"}
UNANSWERED = tuple(status for status, outcome in STATUSES.items() if outcome.ask_again)
BATCH = 8  # passages to judge in one request
IN_FLIGHT = 64  # features at work at a time: each is in memory then, and has one request or some tens of them waiting
TOP, SPREAD = 10, 12  # passages an explainer is shown: the strongest, and from all over the feature's range
FEWEST_EXAMPLES = 2  # to which the examples are halved while the prompt is too long

Item = TypeVar("Item")
Result = TypeVar("Result")


class Answer(NamedTuple):
    """What was read in a reply, or why there is none."""

    status: str  # a Completion's, or "unparsed"
    value: Any = None  # None unless the status is "ok"
    reason: str = ""  # one line


async def explain(feature: Feature, completer: Completer) -> Explanation:
    """Ask for an explanation: with fewer examples where the prompt is too long, once more where it cannot be read.

    One that is too long is asked for once more, too. If it stays too long it is cut, and the reason says so: its scores
    are then those of what is left.
    """
    if not feature.top:
        return without_passages(feature)
    n_top, n_spread = min(TOP, len(feature.top)), min(SPREAD, len(feature.spread))
    while True:
        request = prompts.explain_request(feature, n_top, n_spread)
        answer = await _ask(completer, request, answers.read_explanation)
        if answer.status != "overflow" or n_top + n_spread <= FEWEST_EXAMPLES:
            break
        n_top, n_spread = max(1, n_top // 2), max(min(1, n_spread), n_spread // 2)
    if answer.status != "ok":
        return Explanation(feature.feature, answer.status, reason=answer.reason)
    if answer.value == prompts.NO_PATTERN:
        return Explanation(feature.feature, prompts.NO_PATTERN, reason="the explainer found none")
    return Explanation(feature.feature, "ok", answer.value, answer.reason)


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
    """The label of a feature: its explanation's scores beside those of `other` and of the token it is strongest on.

    An explanation of another status than "ok" is not scored. What was asked in vain is counted in the scores, and the
    label's reason names the statuses, those of the baselines' requests too.
    """
    if explanation.status != "ok":
        return unexplained(explanation, explainer)
    strongest = prompts.quoted(scoring.strongest_token(feature))
    texts = {"own": explanation.text, "other_feature": other and other.text, "top_token": f"the token {strongest}"}
    distinct = list(dict.fromkeys(text for text in texts.values() if text))  # two that say the same are asked once
    scorers = {"detection": _detect, "fuzzing": _fuzz, "simulation": _simulate}
    outcomes = await _all(scorers[method](feature, text, completer, seed) for method in methods for text in distinct)
    found = dict(zip(itertools.product(methods, distinct), outcomes, strict=True))
    scores: dict[str, Score] = {}
    judgements: list[Judgement] = []
    reasons = [explanation.reason] if explanation.reason else []
    for method in methods:
        own = found[method, explanation.text]
        values = {name: found[method, text].score.value for name, text in texts.items() if text and name != "own"}
        scores[method] = own.score._replace(**values)
        judgements += own.judgements
        for name, text in texts.items():
            requests = found[method, text].score.requests if text else ()
            total, of = sum(count for _, count in requests), "" if name == "own" else f" of {BASELINES[name]}"
            reasons += [f"{method}{of}: {count} of {total} requests {each}" for each, count in requests if each != "ok"]
    return Label(feature.feature, explanation.text, explainer, "ok", scores, tuple(judgements), "; ".join(reasons))


async def explain_all(
    features: Iterable[int], load: Callable[[int], Feature], completer: Completer, *, in_flight: int = IN_FLIGHT
) -> AsyncIterator[Explanation]:
    """Explanations of features as they come; `load` gives a feature's record when its turn has come."""

    async def work(index: int) -> Explanation:
        return await explain(load(index), completer)

    async for explanation in _as_they_come(work, features, in_flight):
        yield explanation


async def score_all(
    explanations: Mapping[int, Explanation],
    load: Callable[[int], Feature],
    completer: Completer,
    *,
    explainer: str,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    in_flight: int = IN_FLIGHT,
) -> AsyncIterator[Label]:
    """Labels as they come, exactly one for each explanation."""
    other = scoring.others(index for index, explanation in explanations.items() if explanation.status == "ok")

    async def work(index: int) -> Label:
        if explanations[index].status != "ok":  # whose record need not be made
            return unexplained(explanations[index], explainer)
        baseline = explanations.get(other.get(index))
        return await score(
            load(index), explanations[index], baseline, completer, explainer=explainer, methods=methods, seed=seed
        )

    async for label in _as_they_come(work, explanations, in_flight):
        yield label


def has_failed(label: Label) -> bool:
    """Whether a label lacks its explanation, or most answers to one of its scorers, for other reasons than a budget's.

    A feature without passages to be explained from, or without a pattern, as the explainer says, lacks nothing.
    """
    if label.status != "ok":
        return label.status not in (prompts.NO_PATTERN, "dead", "rare", "stopped")
    in_vain = (score.requests for score in label.scores.values() if score.answered < score.unanswered)
    return any(status not in ("ok", "stopped") for requests in in_vain for status, _ in requests)


class _Outcome(NamedTuple):
    """What one explanation got from one scorer."""

    score: Score
    judgements: list[Judgement]


async def _detect(feature: Feature, explanation: str, completer: Completer, seed: int) -> _Outcome:
    questions = scoring.detection_questions(feature, seed)
    ids = scoring.opaque_ids(feature, seed, "detection", len(questions))

    def request(batch: Sequence[tuple[str, scoring.Question]]) -> Request:
        return prompts.detection_request(explanation, [(id, question.passage) for id, question in batch])

    outcome = await _judge("detection", [list(zip(ids, questions, strict=True))], request, completer, seed)
    return outcome._replace(score=outcome.score._replace(recall=scoring.recall(feature, outcome.judgements)))


async def _fuzz(feature: Feature, explanation: str, completer: Completer, seed: int) -> _Outcome:
    rounds = scoring.fuzzing_questions(feature, seed)
    ids = iter(scoring.opaque_ids(feature, seed, "fuzzing", sum(map(len, rounds))))

    def request(batch: Sequence[tuple[str, scoring.Question]]) -> Request:
        marked = [prompts.Marked(id, question.passage, question.marked) for id, question in batch]
        return prompts.fuzzing_request(explanation, marked)

    with_ids = [[(next(ids), question) for question in questions] for questions in rounds]
    return await _judge("fuzzing", with_ids, request, completer, seed)


async def _simulate(feature: Feature, explanation: str, completer: Completer, seed: int) -> _Outcome:
    passages = scoring.simulation_passages(feature)

    async def one(passage: Any) -> Answer:
        def read(reply: str) -> list[int]:
            return answers.read_activations(reply, len(passage.tokens))

        return await _ask(completer, prompts.simulation_request(explanation, passage), read)

    found = await _all(one(passage) for passage in passages)
    unit = feature.maximum / prompts.LEVELS
    simulated = [
        scoring.Simulated(passage.activations, [unit * level for level in answer.value])
        for passage, answer in zip(passages, found, strict=True)
        if answer.status == "ok"
    ]
    score = scoring.simulation_score(simulated, len(passages), seed)
    return _Outcome(score._replace(requests=_by_status(found)), [])


async def _judge(
    method: str,
    rounds: Sequence[Sequence[tuple[str, scoring.Question]]],
    request: Callable[[Sequence[tuple[str, scoring.Question]]], Request],
    completer: Completer,
    seed: int,
) -> _Outcome:
    """Verdicts on questions, each with its id, in batches that mix no rounds."""

    async def ask(batch: list[tuple[str, scoring.Question]]) -> list[Answer]:
        ids = {id for id, _ in batch}
        answer = await _ask(completer, request(batch), lambda reply: answers.read_verdicts(reply, ids))
        if answer.status == "overflow" and len(batch) > 1:
            return [each for half in await _all(map(ask, scoring.halves(batch))) for each in half]
        return [answer]

    batches = [batch for questions in rounds for batch in scoring.batches(questions, BATCH)]
    found = [answer for each in await _all(map(ask, batches)) for answer in each]
    verdicts = {id: verdict for answer in found if answer.status == "ok" for id, verdict in answer.value.items()}
    judgements = [
        Judgement(method, question.kind, question.index, question.truth, verdicts.get(id))
        for questions in rounds
        for id, question in questions
    ]
    return _Outcome(scoring.verdict_score(judgements, seed)._replace(requests=_by_status(found)), judgements)


async def _ask(completer: Completer, request: Request, read: Callable[[str], Any]) -> Answer:
    """What `read` finds in the reply, or in that to one repair request; the status of whichever has none."""
    completion, problems = await completer.complete(request), []
    while completion.status == "ok":
        try:
            return Answer("ok", read(completion.text))
        except answers.Unreadable as error:
            problems.append(error)
        if len(problems) == 2:
            break
        completion = await completer.complete(prompts.repair_request(request, completion.text, str(problems[0])))
    for problem in reversed(problems):
        if isinstance(problem, answers.TooLong):
            return Answer("ok", answers.cut(problem.explanation), f"cut to {prompts.MAX_WORDS} words: {problem}")
    if completion.status == "truncated":
        return Answer("truncated", reason=_line(f"the reply does not end: {completion.text}"))
    if completion.status != "ok":
        return Answer(completion.status, reason=_line(completion.text))
    return Answer("unparsed", reason=f"{problems[-1]}, in two attempts")


def _by_status(found: Iterable[Answer]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(answer.status for answer in found).items())


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


async def _all(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of awaitables that run together. If one fails, the others are stopped and waited for."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _as_they_come(
    work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], most: int
) -> AsyncIterator[Result]:
    """Results of `work` on the items, at most so many at a time. If one fails, the others are stopped."""
    waiting = iter(items)
    running: set[asyncio.Future[Result]] = set()
    done: set[asyncio.Future[Result]] = set()
    try:
        while True:
            while len(running) < most and (item := next(waiting, None)) is not None:
                running.add(asyncio.ensure_future(work(item)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *done, return_exceptions=True)  # or asyncio complains of what nobody looked at
