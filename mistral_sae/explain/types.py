"""The records of the explain room: features and their passages, requests and replies, explanations, scores and labels.

Plain values: no torch, no network.
"""

from typing import Any, Literal, NamedTuple, Protocol

INTERVALS = 4  # of a feature's activation range, (0, maximum], from each of which examples are taken
BINS = 50  # of its histogram, of equal width over the same range

# What came of a request, or of a feature
Status = Literal[
    "ok", "no pattern", "dead", "rare", "refused", "filtered", "truncated", "overflow", "unparsed", "failed", "stopped"
]


class Outcome(NamedTuple):
    """What a status means."""

    meaning: str
    is_failure: bool  # an answer is missing that should be there
    ask_again: bool  # the next run may get another answer


STATUSES: dict[Status, Outcome] = {
    "ok": Outcome("answered", is_failure=False, ask_again=False),
    "no pattern": Outcome("the explainer found no pattern", is_failure=False, ask_again=False),
    "dead": Outcome("it never fired on the corpus", is_failure=False, ask_again=False),
    "rare": Outcome("it fired only in documents kept for scoring", is_failure=False, ask_again=False),
    "refused": Outcome("the model declined to answer", is_failure=True, ask_again=False),
    "filtered": Outcome("the provider held the answer back", is_failure=True, ask_again=False),
    "truncated": Outcome("the reply did not end, even with more room", is_failure=True, ask_again=False),
    "overflow": Outcome("the prompt is longer than the model's context", is_failure=True, ask_again=False),
    "unparsed": Outcome("two replies could not be read", is_failure=True, ask_again=False),
    "failed": Outcome("the server did not answer, or not in time", is_failure=True, ask_again=True),
    "stopped": Outcome("the budget ended before it was asked", is_failure=False, ask_again=True),
}


class Example(NamedTuple):
    """A passage, and one feature's activation on each of its tokens."""

    document: str  # its id
    start: int  # position of the passage's first token in its row; never 0, where the BOS stands
    tokens: tuple[str, ...]  # none is empty; they join to the passage's text
    activations: tuple[float, ...]  # as many, >= 0, in units of the standardised residual
    concepts: tuple[tuple[str, ...], ...] = ()  # of each token, those that it is of; empty where that is not known

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

    @property
    def text(self) -> str:
        """The passage's text."""
        return "".join(self.tokens)


class Feature(NamedTuple):
    """What a corpus and the model's output matrix show of one feature."""

    feature: int  # its index
    density: float  # share of the corpus's tokens on which it fires
    maximum: float  # its largest activation on the corpus; 0 for one that never fired
    histogram: tuple[int, ...]  # tokens in each of BINS bins of equal width over (0, maximum]
    promoted: tuple[tuple[str, float], ...] = ()  # tokens whose logits it raises most, and the logits; strongest first
    suppressed: tuple[tuple[str, float], ...] = ()  # tokens whose logits it lowers most
    nearest: tuple[tuple[int, float], ...] = ()  # features by cosine of the decoder rows, and the cosine
    coactive: tuple[tuple[int, float], ...] = ()  # features by share of its tokens on which they fire, and the share
    top: tuple[Example, ...] = ()  # the strongest passages, strongest first; at most one a document, as in all five
    spread: tuple[Example, ...] = ()  # random ones of each interval of its range; with `top`, what to explain it from
    held_out: tuple[Example, ...] = ()  # of each interval, of other documents than these two: what to score it on
    random: tuple[Example, ...] = ()  # passages of those other documents on which it does not fire
    hard: tuple[Example, ...] = ()  # the same, of yet others, with a token it fires on elsewhere or a near one firing


class Request(NamedTuple):
    """A chat completion to ask for."""

    messages: list[dict[str, str]]  # {"role", "content"}
    schema: dict[str, Any] | None  # JSON schema of the reply, for servers that can enforce one
    max_tokens: int  # of the reply


class Completion(NamedTuple):
    """What came back for a Request."""

    status: Status
    text: str  # the reply; for other statuses than "ok" what there is of it, or the reason in one line
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completer(Protocol):
    """Whatever completes chats: a server, or the loaded model itself."""

    async def complete(self, request: Request) -> Completion:
        """Return the completion of a request. One that fails is a status, not an exception."""


class Explanation(NamedTuple):
    """What an explainer says a feature stands for."""

    feature: int
    status: Status
    text: str = ""  # "" unless the status is "ok"
    reason: str = ""  # one line


class Question(NamedTuple):
    """A passage that a scorer is asked about, with the right answer."""

    id: str  # shown to the scorer; tells nothing
    kind: str  # the field of Feature that holds the passage: "held_out", "random" or "hard"
    index: int  # type: ignore[assignment]  # its place there (tuple.index is never called)
    truth: bool  # whether the feature fires in it (detection), or the marks are where it fires (fuzzing)
    passage: Example
    marked: frozenset[int] = frozenset()  # fuzzing: indices of the tokens that are claimed to be active


class Judgement(NamedTuple):
    """What a scorer said of one passage of a feature; `kind`, `index` and `truth` as in Question."""

    method: str  # "detection" or "fuzzing"
    kind: str
    index: int  # type: ignore[assignment]  # as in Question
    truth: bool
    verdict: bool | None  # None: no answer, which counts neither for nor against


class Score(NamedTuple):
    """How well an explanation predicts a feature on passages it was not made from, with two baselines."""

    value: float | None  # balanced accuracy (detection, fuzzing) or Pearson correlation (simulation); None: no answers
    low: float | None = None  # 95 % bootstrap interval of `value`
    high: float | None = None
    other_feature: float | None = None  # `value` with another feature's explanation in its place
    top_token: float | None = None  # `value` with an explanation that is just the token it is strongest on
    answered: int = 0  # items
    unanswered: int = 0  # items without an answer, or with one that could not be read
    recall: tuple[float | None, ...] = ()  # detection: share of the passages of each interval that were found
    r2: float | None = None  # simulation: share of the variance that the prediction explains
    requests: tuple[tuple[Status, int], ...] = ()  # made for `value`, counted by status


class Concept(NamedTuple):
    """What a feature tells best of all features, and how well, in documents that it was not chosen on."""

    name: str  # such as "number"
    precision: float  # share of the tokens on which it fires that are of the concept
    lift: float  # the same beside the concept's share of all tokens: how many times as many as by chance
    recall: float  # share of the concept's tokens on which it fires

    @property
    def f1(self) -> float:
        """How well firing tells the concept's tokens."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)


class Label(NamedTuple):
    """One line of explanations.jsonl."""

    feature: int
    explanation: str  # a model's has at most 20 words; "" unless the status is "ok"
    explainer: str  # "offline", "mistral" or the name of the model that was asked
    status: Status
    scores: dict[str, Score]  # by method: "detection", "fuzzing", "simulation"
    judgements: tuple[Judgement, ...] = ()
    reason: str = ""  # one line: why the status is not "ok", or what went wrong although it is
    concept: Concept | None = None  # that the explanation says in words
    is_beside: bool = False  # it was explained for its concept, beside those that SELECT draws: it counts in no mean


def without_passages(feature: Feature) -> Explanation:
    """Return the explanation of a feature that has no passage to be explained from: dead or rare."""
    status: Status = "dead" if feature.maximum == 0 else "rare"
    return Explanation(feature.feature, status, reason=STATUSES[status].meaning)


def unexplained(explanation: Explanation, explainer: str) -> Label:
    """Return the label of a feature whose explanation's status is not "ok"; it has no scores."""
    return Label(explanation.feature, "", explainer, explanation.status, {}, (), explanation.reason)
