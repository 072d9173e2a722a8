"""What can be asked of the server: a type for the body of each request, with its limits."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mistral_sae.model.language_model import LanguageModel
from mistral_sae.schema import STRICT, Index, Schema
from mistral_sae.steer.steering import Edit

BODY = 1_000_000  # bytes of a request
TOKENS = 2**14  # of a text that is read, or of a prompt with what continues it
LIKELIEST = 20  # tokens whose log-probabilities can be asked for beside each token's own

Text = Annotated[str, Field(max_length=200_000)]
Prompt = Annotated[str, Field(max_length=50_000)]
Examples = Annotated[list[Text], Field(min_length=1, max_length=64)]
Tokens = Annotated[int, Field(ge=1, le=4096)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Strength = Annotated[float, Field(ge=-1e6, le=1e6)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=8)]
Method = Literal["clamp", "add", "ablate", "raw"]


class Asked(Schema):
    """The body of a request of this page's own, which has no fields but these."""

    model_config = STRICT | ConfigDict(extra="forbid")


class Steer(Asked):
    """An edit in demo.py's units; without a feature the model is left as it is."""

    features: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Strength], Field(max_length=16)] = Field(
        default_factory=dict
    )
    method: Method = "clamp"
    positions: Literal["all", "generated"] = "all"
    exact: bool = False

    def edit(self) -> Edit:
        """The same as demo.py has it; without a feature how is all the same."""
        if not self.features:
            return Edit({})
        coefficients = {int(feature): c for feature, c in self.features.items()}
        return Edit(coefficients, self.method, self.positions == "generated", self.exact)


class Rival(Asked):
    """The difference of means: the mean residual of some texts less that of others, added beside a feature."""

    toward: Examples
    away: Examples
    strength: Strength = 0.3  # in norms of the residual


class Reading(Asked):
    """Features of a text's tokens."""

    text: Text
    top: Annotated[int, Field(ge=1, le=1024)] = 10  # features a token, at most


class Effect(Asked):
    """What a feature changes in the prediction of the token after `position`."""

    text: Text
    feature: Index
    position: Index


class Writing(Asked):
    """Texts that continue a prompt: the model's own, the steered one and, if asked for, a rival's."""

    prompt: Prompt
    steer: Steer
    rival: Rival | None = None
    max_tokens: Tokens = 64
    temperature: Temperature = 0.7
    seed: Seed = 0
    stop: Stop = Field(default_factory=list)


class Sweep(Asked):
    """Figures of texts over the strengths of an edit."""

    prompt: Prompt
    steer: Steer
    texts: Annotated[int, Field(ge=1, le=16)] = 4
    max_tokens: Annotated[int, Field(ge=4, le=256)] = 32
    temperature: Temperature = 0.7
    seed: Seed = 0


# ---- OpenAI's, whose clients send more fields than are read here ----


class Sampled(Schema):
    """What both of its requests have."""

    model: str = ""
    steer: Steer = Steer()
    temperature: Temperature | None = 1.0
    seed: Seed | None = None  # None draws one
    stop: Stop | str | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    stream: bool | None = False

    @property
    def stops(self) -> list[str]:
        """The stop sequences, in a list in any case."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


Ids = Annotated[list[Index], Field(max_length=TOKENS)]


class Completion(Sampled):
    """/v1/completions."""

    prompt: Prompt | Ids | Annotated[list[Prompt] | list[Ids], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=0, le=4096)] | None = None  # 0 with echo: of the prompt alone
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None

    def prompts(self, model: LanguageModel) -> list[list[int]]:
        """The token ids of each prompt as they were sent: those of a text have no BOS."""
        given: Any = self.prompt
        some = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
        return [model.tokenizer.encode(each) if isinstance(each, str) else each for each in some]


class Part(Schema):
    """Of a message in parts; only text is read."""

    type: Literal["text"]
    text: Prompt


class Message(Schema):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Prompt | list[Part]

    @property
    def text(self) -> str:
        """Its text, whatever form it came in."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Sampled):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
