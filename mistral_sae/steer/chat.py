"""A conversation with a steered model in a terminal, a line at a time."""

import codecs
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_sae.cli import UserError
from mistral_sae.files import append_line
from mistral_sae.model.language_model import LanguageModel, ModelError

HELP = """\
/feature 12         steer with feature 12; with words, the feature that matches them best; or {12: 2, 40: -1}
/coefficient 2      how strongly, in the method's unit; None leaves the feature as it is; of several, see /feature
/method clamp       clamp, add, ablate or raw
/off                stop steering; /on, or any of the above, steers again
/both               show each reply without steering, too; again for the steered one alone
/help               this list
/quit               end, as Ctrl-D does; Ctrl-C stops a reply"""


@dataclass(frozen=True)
class Steering:
    """What the commands change."""

    coefficients: dict[int, float | None]  # by feature, in the method's unit
    method: str
    on: bool = True
    both: bool = False


# What follows /feature, and the coefficient so far -> coefficients by feature
Find = Callable[[str, float | None], dict[int, float | None]]


class CommandError(UserError):
    """A command that is none, or that cannot be carried out: one line."""


def obey(command: str, steering: Steering, find: Find) -> Steering:
    """The steering after a command. Raises CommandError."""
    name, _, argument = command.strip().partition(" ")
    argument = argument.strip()
    if name in ("/feature", "/coefficient", "/method") and not argument:
        raise CommandError(f"{name} needs a value: /help shows examples")
    if name == "/feature":
        return replace(steering, coefficients=find(argument, next(iter(steering.coefficients.values()))), on=True)
    if name == "/coefficient":
        if len(steering.coefficients) > 1:
            raise CommandError("each of several features has its own coefficient: expected /feature {12: 2, 40: -1}")
        try:
            coefficient = None if argument.lower() == "none" else float(argument)
        except ValueError:
            raise CommandError(f"found coefficient {argument!r}: expected a number or None") from None
        return replace(steering, coefficients=dict.fromkeys(steering.coefficients, coefficient), on=True)
    if name == "/method":
        return replace(steering, method=argument, on=True)
    if name in ("/on", "/off"):
        return replace(steering, on=name == "/on")
    if name == "/both":
        return replace(steering, both=not steering.both)
    raise CommandError(f"there is no command {name}: /help lists them")


class History:
    """The turns so far, and the prompt they make.

    In the chat format of the model's tokenizer, or, for a model that has none, as one text in which each line of the
    user's is followed by what the model made of it. Turns that no longer fit are forgotten, the oldest first.
    """

    def __init__(self, lm: LanguageModel, is_instruct: bool, context: int, max_tokens: int):
        self._lm, self._is_instruct, self._room = lm, is_instruct, context - max_tokens
        self._turns: list[tuple[str, str]] = []  # what the user wrote, the reply

    def prompt(self, line: str) -> list[int]:
        """Token ids, BOS included, that a reply to `line` continues. Raises CommandError if they are too many."""
        while True:
            ids = self._format(line)
            if len(ids) <= self._room:
                return ids
            if not self._turns:
                raise CommandError(
                    f"found a line of {len(ids)} tokens, expected at most {self._room}: shorten it, or see CHAT_CONTEXT"
                )
            del self._turns[0]

    def add(self, line: str, reply: str) -> None:
        """Remember a turn."""
        self._turns.append((line, reply))

    def _format(self, line: str) -> list[int]:
        tokenizer = self._lm.tokenizer
        if not self._is_instruct:
            text = "".join(f"{said}\n{reply}\n" for said, reply in self._turns) + f"{line}\n"
            return [tokenizer.bos_id, *tokenizer.encode(text)]
        messages = []
        for said, reply in self._turns:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        return tokenizer.chat([*messages, {"role": "user", "content": line}])


def has_chat_format(lm: LanguageModel) -> bool:
    """Whether the model's tokenizer has a chat format."""
    try:
        lm.tokenizer.chat([{"role": "user", "content": "Hello"}])
    except ModelError:
        return False
    return True


def converse(
    lm: LanguageModel,
    steering: Steering,
    *,
    steered: Callable[[Steering, int], AbstractContextManager],
    find: Find,
    describe: Callable[[Steering], str],
    is_instruct: bool,
    context: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    transcript: Path,
) -> None:
    """Read lines and commands from the standard input until it ends, and reply. Ctrl-C stops a reply.

    Args:
        steered: the steering and the length of the prompt -> the edit to generate under.
        find: the features that /feature means.
        describe: one line about the steering; raises ValueError for one that cannot be, and which is not taken over.
        is_instruct: use the tokenizer's chat format.
        context: tokens of a conversation, with the reply to come.
        transcript: JSONL to which every turn is added.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  lines can then be edited
    history = History(lm, is_instruct, context, max_tokens)
    turn = 0
    print(describe(steering))
    while True:
        try:
            line = input("\nyou> ").strip()
            if line == "/quit":
                return
            if line == "/help":
                print(HELP)
            elif line.startswith("/"):
                wanted = obey(line, steering, find)
                print(describe(wanted))
                steering = wanted
            elif line:
                ids = history.prompt(line)
                sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed + turn}
                record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "turn": turn, "user": line}
                record |= {"features": steering.coefficients, "method": steering.method, "on": steering.on}
                if steering.both and steering.on:
                    print("without steering>")
                    plain, record["unsteered_stopped"] = reply_to(lm, ids, nullcontext(), is_instruct, sampling)
                    record["unsteered_reply"] = plain
                    print("with steering>")
                edit = steered(steering, len(ids)) if steering.on else nullcontext()
                reply, stopped = reply_to(lm, ids, edit, is_instruct, sampling)
                if reply.strip():  # chat formats take no empty turn
                    history.add(line, reply)
                append_line(transcript, record | {"reply": reply, "stopped": stopped})
                turn += 1
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation")
        except ValueError as error:  # CommandError, and what choosing or steering raises
            print(f"error: {error}")


def reply_to(
    lm: LanguageModel, ids: list[int], edit: AbstractContextManager, is_instruct: bool, sampling: dict
) -> tuple[str, bool]:
    """Print a reply as it comes; the reply, and whether Ctrl-C stopped it."""
    parts: list[str] = []
    stopped = False
    try:
        with edit:
            for part in pieces(lm, lm.generate(ids, **sampling)):
                if is_instruct and not any(parts):
                    part = part.lstrip(" ")  # the space before a text of sentencepiece
                parts.append(part)
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(" (stopped)", end="")
    print()
    return "".join(parts), stopped


def pieces(lm: LanguageModel, ids: Iterator[int]) -> Iterator[str]:
    """The texts of tokens as they come; characters whose bytes are spread over several come with the last."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for id in ids:
        yield decoder.decode(lm.tokenizer.token_bytes(id))
    yield decoder.decode(b"", final=True)
