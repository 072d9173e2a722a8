"""A conversation with a steered model in a terminal, a line at a time."""

import codecs
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import Terminated, UserError
from mistral_sae.files import append_line
from mistral_sae.model.language_model import LanguageModel, ModelError
from mistral_sae.steer.display import visible
from mistral_sae.steer.steering import Edit, Subject

HELP = """\
/feature 12         steer with feature 12; with words, the feature that matches them best; or {12: 2, 40: -1}
/coefficient 2      how strongly, in the method's unit; auto finds the strongest that stays fluent
/method clamp       clamp, add, ablate or raw
/off                stop steering; /on, or any of the above, steers again
/both               show each reply without steering, too; again for the steered one alone
/reset              forget the conversation so far
/help               this list
/quit               end, as Ctrl-D does; Ctrl-C stops a reply"""

# How, a feature or what follows /feature, and a coefficient (None: it is found) -> the edit with them
Find = Callable[[Edit, int | str, float | None], Edit]


class Sampling(NamedTuple):
    """How replies are generated."""

    max_tokens: int
    temperature: float
    seed: int  # of the first turn; each later one counts it up


class Conversation:
    """A conversation with a model that commands steer; every turn is added to a transcript.

    Args:
        edit: what the first replies are steered with.
        find: the edit with the features that /feature means, and with a coefficient; what it raises is printed.
        coefficient: of features to come; None is found for each.
        context: tokens the model is given at most, with the reply to come; the oldest turns are forgotten.
        transcript: JSONL file.
        is_instruct: use the tokenizer's chat format. Without it the conversation is one text, in which each line of
            the user's is followed by what the model made of it.
    """

    def __init__(
        self,
        subject: Subject,
        edit: Edit,
        find: Find,
        *,
        coefficient: float | None,
        context: int,
        sampling: Sampling,
        transcript: Path,
        is_instruct: bool,
    ):
        self.edit, self.is_on, self.shows_both = edit, True, False
        self.messages: list[dict[str, str]] = []  # by user and assistant in turn
        self._subject, self._find, self._sampling, self._coefficient = subject, find, sampling, coefficient
        self._transcript, self._is_instruct, self._turn = transcript, is_instruct, 0
        self._room = context - sampling.max_tokens

    def run(self) -> None:
        """Read lines and commands from the standard input until it ends, and answer. Ctrl-C stops a reply."""
        with suppress(ImportError):
            import readline  # noqa: F401  lines can then be edited
        print(self.describe())
        while True:
            try:
                line = input("\nyou> ").strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.say(line)
            except EOFError:
                print()
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D ends the conversation")
            except UserError as error:
                print(f"error: {error}")

    def describe(self) -> str:
        """One line about the steering."""
        edit = self.edit.describe(self._subject)
        both = "; each reply without steering, too" if self.shows_both else ""
        return f"steering: {edit}{both}" if self.is_on else f"steering is off ({edit})"

    def command(self, line: str) -> None:
        """Carry out a command and print what holds from now on; one that fails changes nothing. Raises UserError."""
        name, _, argument = line.partition(" ")
        argument, edit, coefficient = argument.strip(), self.edit, self._coefficient
        if name == "/help":
            print(HELP)
            return
        if name == "/reset":
            self.messages.clear()
            print("the conversation so far is forgotten")
            return
        if name in ("/feature", "/coefficient", "/method") and not argument:
            raise UserError(f"{name} needs a value: /help shows examples")
        only = next(iter(edit.coefficients)) if len(edit.coefficients) == 1 else None
        if name == "/feature":
            edit = self._find(edit, argument, coefficient)
        elif name == "/coefficient":
            if only is None:
                raise UserError("each of several features has its own coefficient: expected /feature {12: 2, 40: -1}")
            coefficient = coefficient_of(argument)
            edit = self._find(edit, only, coefficient)
        elif name == "/method":
            edit = replace(edit, method=argument)
            edit.in_units_of_steer(self._subject)
            if only is not None and coefficient is None:  # its unit is another
                edit = self._find(edit, only, None)
        elif name not in ("/on", "/off", "/both"):
            raise UserError(f"there is no command {name}: /help lists them")
        edit.in_units_of_steer(self._subject)  # raises for what cannot be steered
        self.edit, self._coefficient = edit, coefficient
        if name == "/both":
            self.shows_both = not self.shows_both
        else:
            self.is_on = name != "/off"
        print(self.describe())

    def say(self, line: str) -> str:
        """Print the model's reply to a line as it comes, and return it. Raises UserError if the line is too long."""
        ids = self.prompt(line)
        record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "turn": self._turn, "user": line}
        record |= {"features": dict(self.edit.coefficients), "method": self.edit.method, "on": self.is_on}
        if self.shows_both and self.is_on:
            print("without steering>")
            record["unsteered_reply"], record["unsteered_stopped"] = self._reply(ids, nullcontext())
            print("with steering>")
        reply, stopped = self._reply(ids, self.edit.context(self._subject, len(ids)) if self.is_on else nullcontext())
        if reply.strip():  # chat formats take no empty turn
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
        append_line(self._transcript, record | {"reply": reply, "stopped": stopped})
        self._turn += 1
        return reply

    def prompt(self, line: str) -> list[int]:
        """Token ids, BOS included, that a reply to `line` continues; turns that leave no room for it are forgotten."""
        for start in range(0, len(self.messages) + 1, 2):
            kept = self.messages[start:]
            ids = prompt_of(self._subject.model, [*kept, {"role": "user", "content": line}], self._is_instruct)
            if len(ids) <= self._room:
                self.messages = kept
                return ids
        raise UserError(
            f"found a line of {len(ids)} tokens, expected at most {self._room}: shorten it, or see CHAT_CONTEXT"
        )

    def _reply(self, ids: list[int], edit: AbstractContextManager) -> tuple[str, bool]:
        """Print a reply as it comes; the reply, and whether Ctrl-C stopped it."""
        model, parts, stopped = self._subject.model, [""], False
        max_tokens, temperature, seed = self._sampling
        generated = model.generate(ids, max_tokens, temperature, seed=seed + self._turn)
        try:
            with edit:
                for part in pieces(model, generated):
                    if self._is_instruct and not any(parts):
                        part = part.lstrip(" ")  # the space before a text of sentencepiece
                    parts.append(part)
                    print(visible(part), end="", flush=True)
        except Terminated:
            raise
        except KeyboardInterrupt:
            stopped = True
            print(" (stopped)", end="")
        print()
        return "".join(parts), stopped


def coefficient_of(argument: str) -> float | None:
    """The number that is written there; None for one that is to be found. Raises UserError."""
    try:
        return None if argument.lower() in ("auto", "none") else float(argument)
    except ValueError:
        raise UserError(f"found coefficient {argument!r}: expected a number or auto") from None


def prompt_of(model: LanguageModel, messages: list[dict[str, str]], is_instruct: bool) -> list[int]:
    """The token ids that a reply to {"role", "content"} messages continues; without a chat format they are one text."""
    if is_instruct:
        return model.tokenizer.chat(messages)
    return model.encode("".join(message["content"] + "\n" for message in messages))


def has_chat_format(model: LanguageModel) -> bool:
    """Whether the model's tokenizer has a chat format."""
    try:
        model.tokenizer.chat([{"role": "user", "content": "Hello"}])
    except ModelError:
        return False
    return True


def pieces(model: LanguageModel, ids: Iterator[int]) -> Iterator[str]:
    """The texts of tokens as they come; characters whose bytes are spread over several come with the last."""
    return codecs.iterdecode(map(model.tokenizer.token_bytes, ids), "utf-8", errors="replace")
