"""What is known of a feature, and what is asked of a language model about it. Plain values: no torch, no network."""

from typing import Any, NamedTuple, Protocol

INTERVALS = 4  # of a feature's activation range, (0, maximum], from which examples are drawn
BINS = 50  # of its histogram, of equal width over the same range


class Example(NamedTuple):
    """A passage, and one feature's activation on each of its tokens."""

    document: str  # its id
    start: int  # position of the passage's first token in its row; never 0, where the BOS stands
    tokens: tuple[str, ...]  # they join to the passage's text
    activations: tuple[float, ...]  # as many, >= 0, in units of the standardised residual

    @property
    def peak(self) -> int:
        """Index of the token on which the feature is strongest."""
        return max(range(len(self.tokens)), key=self.activations.__getitem__)

    @property
    def strength(self) -> float:
        """The feature's largest activation in the passage."""
        return self.activations[self.peak]

    def interval(self, maximum: float) -> int:
        """Which of the INTERVALS of (0, maximum] its strength lies in; 0 is the weakest."""
        return min(INTERVALS - 1, int(INTERVALS * self.strength / maximum)) if maximum > 0 else 0


class Feature(NamedTuple):
    """What a corpus and the model's output matrix show of one feature."""

    feature: int  # its index
    density: float  # share of the corpus's tokens on which it fires
    maximum: float  # its largest activation on the corpus; 0 for one that never fired
    histogram: tuple[int, ...]  # tokens in each of BINS bins of equal width over (0, maximum]
    promoted: tuple[tuple[str, float], ...]  # tokens whose logits it raises most, and the logits; strongest first
    suppressed: tuple[tuple[str, float], ...]  # likewise, lowered
    nearest: tuple[tuple[int, float], ...]  # features by cosine of the decoder rows, and the cosine
    coactive: tuple[tuple[int, float], ...]  # features by share of its tokens on which they fire too, and the share
    top: tuple[Example, ...]  # the strongest passages, strongest first; at most one a document, as below
    spread: tuple[Example, ...]  # a random choice from each interval of its range; with `top`, what to explain it from
    held_out: tuple[Example, ...]  # from each interval, of other documents than `top` and `spread`: what to score it on
    random: tuple[Example, ...]  # passages of those other documents on which it does not fire; at most one a document
    hard: tuple[Example, ...]  # likewise, of yet others, but with a token it fires on elsewhere or a near one firing


def without_examples(feature: Feature) -> tuple[str, str]:
    """The status of a feature that has no passage to be explained from, and the reason."""
    if feature.maximum == 0:
        return "dead", "it never fired on the corpus"
    return "rare", "it fired in no document but those that explanations are scored on"


class Judgement(NamedTuple):
    """What a scorer said of one passage of a feature."""

    method: str  # "detection" or "fuzzing"
    kind: str  # the field of Feature that holds the passage: "held_out", "random" or "hard"
    index: int  # its place there
    truth: bool  # whether the feature fires in it (detection), or the marks are where it fires (fuzzing)
    verdict: bool | None  # what the scorer said; None for no answer, which counts neither for nor against


class Score(NamedTuple):
    """How well an explanation predicts a feature on passages it was not made from, beside two baselines."""

    value: float | None  # balanced accuracy (detection, fuzzing) or Pearson correlation (simulation); None: no answers
    low: float | None  # 95 % bootstrap interval of `value`
    high: float | None
    other_feature: float | None  # `value` with another feature's explanation in its place
    top_token: float | None  # `value` with an explanation that is just the token it is strongest on
    answered: int  # items
    unanswered: int  # items without an answer, or with one that could not be read
    recall: tuple[float | None, ...] = ()  # detection: share of the passages of each interval that were found
    r2: float | None = None  # simulation: share of the variance that the prediction explains
    requests: tuple[tuple[str, int], ...] = ()  # those made for `value`, by what came of them: ("ok", 5), ...


class Label(NamedTuple):
    """One line of explanations.jsonl."""

    feature: int
    explanation: str  # at most 20 words; "" unless the status is "ok"
    explainer: str  # "offline", "mistral" or the name of the model that was asked
    status: str  # "ok", "no pattern", "unparsed", "dead" or "rare" (nothing to explain it from), or a Completion's
    scores: dict[str, Score]  # by method: "detection", "fuzzing", "simulation"
    judgements: tuple[Judgement, ...]
    reason: str = ""  # one line: why the status is not "ok", or what went wrong although it is


class Request(NamedTuple):
    """A chat completion to ask for."""

    messages: list[dict[str, str]]  # {"role", "content"}
    schema: dict[str, Any] | None  # JSON schema of the reply, for servers that can enforce one
    max_tokens: int  # of the reply


class Completion(NamedTuple):
    """What came back."""

    # "ok"; "refused" by the model, "filtered" by the provider, "truncated" even with more room, "overflow" when the
    # prompt is longer than the model's context, "failed" when the server did not answer in time or at all, "stopped"
    # when the budget ended before it was asked
    status: str
    text: str  # the reply; for other states than "ok" what there is of it, or the reason in one line
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completer(Protocol):
    """Whatever completes chats: a server (`client`), or the loaded model itself."""

    async def complete(self, request: Request) -> Completion:
        """The completion of a request. One that fails is a status, not an exception."""
