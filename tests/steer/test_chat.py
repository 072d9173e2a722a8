"""Commands, the prompt of a conversation, and its transcript."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_steering import F, autoencoder, loaded_of

from mistral_sae.cli import UserError
from mistral_sae.model.language_model import load_model
from mistral_sae.sae.features import Statistics
from mistral_sae.steer import chat
from mistral_sae.steer.chat import Conversation, Sampling
from mistral_sae.steer.steering import Edit, SteeringError, Subject

EDIT = Edit({12: 1.0}, "clamp")


@pytest.fixture(scope="module")
def lm(mistral_folder):
    return load_model(mistral_folder, device="cpu")


@pytest.fixture(scope="module")
def subject(lm):
    loaded = loaded_of(autoencoder())
    return Subject(lm, loaded, Statistics(loaded.maximum_F, torch.full((F,), 0.001), None), {})


FOUND = 7.0  # what is found where no coefficient is given


def find(edit, wanted, coefficient):
    if wanted == "nothing":
        raise SteeringError("found no feature for 'nothing'")
    return replace(edit, coefficients={40 if isinstance(wanted, str) else wanted: coefficient or FOUND})


@pytest.fixture
def conversation_of(subject, tmp_path):
    """A conversation that begins with an edit."""

    def of(edit=EDIT, **options):
        options = {"context": 400, "sampling": Sampling(6, 0.0, 0), "is_instruct": True} | options
        options = {"coefficient": 1.0} | options
        return Conversation(subject, edit, find, transcript=tmp_path / "chat.jsonl", **options)

    return of


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/feature exception", Edit({40: 1.0}, "clamp")),
        ("/coefficient 2.5", Edit({12: 2.5}, "clamp")),
        ("/coefficient -3", Edit({12: -3.0}, "clamp")),
        ("/coefficient auto", Edit({12: FOUND}, "clamp")),
        ("/method add", Edit({12: 1.0}, "add")),
        ("/off", EDIT),
        ("/on", EDIT),
        ("/both", EDIT),
        ("/help", EDIT),
    ],
)
def test_commands_change_the_edit(conversation_of, command, expected):
    conversation = conversation_of()
    conversation.command(command)
    assert conversation.edit == expected
    assert conversation.is_on == (command != "/off")
    assert conversation.shows_both == (command == "/both")


def test_another_feature_takes_the_coefficient_that_was_set(conversation_of):
    conversation = conversation_of()
    conversation.command("/coefficient 2")
    conversation.command("/feature http")
    assert conversation.edit.coefficients == {40: 2.0}


def test_while_coefficients_are_found_each_feature_and_each_method_has_its_own(conversation_of):
    conversation = conversation_of(coefficient=None)
    conversation.command("/feature http")
    assert conversation.edit == Edit({40: FOUND})
    conversation.command("/coefficient 2")
    conversation.command("/method add")
    assert conversation.edit == Edit({40: 2.0}, "add")
    conversation.command("/coefficient auto")
    assert conversation.edit == Edit({40: FOUND}, "add")
    conversation.edit = Edit({40: 3.0}, "add")
    conversation.command("/method raw")
    assert conversation.edit == Edit({40: FOUND}, "raw")


def test_a_reset_forgets_what_was_said_and_keeps_the_edit(lm, conversation_of, capsys):
    conversation = conversation_of()
    conversation.messages = turns(("def f", "return 1"))
    conversation.command("/off")
    conversation.command("/reset")
    assert "forgotten" in capsys.readouterr().out
    assert conversation.prompt("more") == lm.tokenizer.chat([{"role": "user", "content": "more"}])
    assert (conversation.edit, conversation.is_on) == (EDIT, False)


@pytest.mark.parametrize("command", ["/feature exception", "/coefficient 1", "/method clamp", "/on"])
def test_whatever_is_set_turns_steering_on_again(conversation_of, command):
    conversation = conversation_of()
    conversation.command("/off")
    conversation.command(command)
    assert conversation.is_on


def test_several_features_keep_their_coefficients(conversation_of):
    conversation = conversation_of(Edit({3: 2.0, 4: -1.0}))
    with pytest.raises(UserError, match="each of several"):
        conversation.command("/coefficient 3")
    assert conversation.edit == Edit({3: 2.0, 4: -1.0})


@pytest.mark.parametrize("command", ["/coefficient two", "/coefficient", "/feature", "/method", "/of"])
def test_unknown_commands_and_missing_values_say_so(conversation_of, command):
    with pytest.raises(UserError, match=r"/|coefficient"):
        conversation_of().command(command)


def turns(*pairs):
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def test_the_prompt_is_in_the_chat_format_of_the_tokenizer(lm, conversation_of):
    conversation = conversation_of()
    conversation.messages = turns(("def f", "return 1"))
    expected = [*turns(("def f", "return 1")), {"role": "user", "content": "more"}]
    assert conversation.prompt("more") == lm.tokenizer.chat(expected)


def test_without_a_chat_format_the_prompt_is_one_text(lm, conversation_of):
    conversation = conversation_of(is_instruct=False)
    conversation.messages = turns(("def f():", "    return 1"))
    expected = lm.tokenizer.encode("def f():\n    return 1\nf()\n")
    assert conversation.prompt("f()") == [lm.tokenizer.bos_id, *expected]


@pytest.mark.parametrize("is_instruct", [True, False])
def test_the_oldest_turns_are_forgotten_where_the_context_is_full(lm, conversation_of, is_instruct):
    conversation = conversation_of(is_instruct=is_instruct, context=86)  # six of which are the reply's
    conversation.messages = turns(*((f"question {i}", f"reply {i}") for i in range(10)))
    ids = conversation.prompt("last")
    text = lm.tokenizer.decode(ids)
    assert len(ids) <= 80
    assert "last" in text
    assert "reply 9" in text
    assert "question 0" not in text
    kept = list(conversation.messages)
    with pytest.raises(UserError, match="expected at most 80"):
        conversation.prompt("word " * 100)
    assert conversation.messages == kept  # a line that is too long costs none of them


def test_a_tokenizer_without_a_chat_format_is_recognised(lm, hugging_face_folder, tmp_path):
    assert chat.has_chat_format(lm)
    assert chat.has_chat_format(load_model(hugging_face_folder, device="cpu"))
    folder = shutil.copytree(hugging_face_folder, tmp_path / "base")
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert not chat.has_chat_format(load_model(folder, device="cpu"))


@pytest.fixture
def converse(conversation_of, tmp_path, monkeypatch, capsys):
    """Run a conversation of some lines: what was printed, the turns, and the edits with their prompts' lengths."""

    def run(*lines, **options):
        remaining, steered_with = iter(lines), []

        def read(prompt):
            line = next(remaining, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            return line

        def context(edit, subject, length):
            steered_with.append((edit, length))
            return nullcontext()

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(Edit, "context", context)
        conversation_of(**options).run()
        transcript = tmp_path / "chat.jsonl"
        turns = [json.loads(line) for line in transcript.read_text().splitlines()] if transcript.exists() else []
        return capsys.readouterr().out, turns, steered_with

    return run


def test_a_turn_is_answered_and_written_down(lm, converse):
    out, turns, steered_with = converse("def f", "more")
    ids = lm.tokenizer.chat([{"role": "user", "content": "def f"}])
    reply = "".join(lm.tokenizer.strings(list(lm.generate(ids, 6)))).lstrip(" ")
    assert turns[0]["user"] == "def f"
    assert turns[0]["reply"] == reply
    assert turns[0]["stopped"] is False
    assert (turns[0]["features"], turns[0]["method"], turns[0]["on"]) == ({"12": 1.0}, "clamp", True)
    assert reply in out
    assert [turn["turn"] for turn in turns] == [0, 1]
    assert steered_with[0][1] == len(ids)
    assert steered_with[1][1] > len(ids)  # the second prompt has the first turn in it


def test_commands_hold_for_the_turns_after_them_and_mistakes_change_nothing(converse):
    out, turns, steered_with = converse(
        "/feature exception",
        "a",
        "/method wrong",
        "/feature nothing",
        "/nonsense",
        "b",
        "/off",
        "c",
        "/help",
        "/quit",
        "d",
    )
    assert [edit.coefficients for edit, _ in steered_with] == [{40: 1.0}, {40: 1.0}]  # none after /off
    assert [turn["on"] for turn in turns] == [True, True, False]
    assert {turn["method"] for turn in turns} == {"clamp"}
    assert out.count("error: ") == 3
    assert "found no feature for 'nothing'" in out
    assert "/coefficient 2" in out
    assert "d" not in [turn["user"] for turn in turns]


def test_both_shows_and_records_the_reply_without_steering_too(converse):
    out, turns, steered_with = converse("/both", "a", "/both", "b")
    assert "unsteered_reply" in turns[0]
    assert "unsteered_reply" not in turns[1]
    assert out.count("without steering>") == 1
    assert len(steered_with) == 2


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on(lm, converse, monkeypatch):
    generate = lm.generate

    def interrupted(*args, **kwargs):
        for i, id in enumerate(generate(*args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield id

    monkeypatch.setattr(lm, "generate", interrupted)
    out, turns, _ = converse("a", KeyboardInterrupt(), "b")
    assert [turn["stopped"] for turn in turns] == [True, True]
    assert out.count("(stopped)") == 2
    assert "/quit or Ctrl-D ends" in out


@pytest.mark.parametrize("is_stopped", [True, False])
def test_after_a_reply_of_nothing_the_conversation_goes_on(lm, converse, monkeypatch, is_stopped):
    generate, calls = lm.generate, []

    def silent_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            yield from generate(*args, **kwargs)
        elif is_stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(lm, "generate", silent_at_first)
    out, turns, _ = converse("a", "b")
    assert "error" not in out
    assert [(turn["user"], turn["reply"] != "") for turn in turns] == [("a", False), ("b", True)]
    assert turns[0]["stopped"] is is_stopped


def test_a_reply_cannot_move_colour_or_turn_what_the_terminal_shows(lm, converse, monkeypatch):
    hostile = "a\x1b]0;title\x07\x1b[2Jb\r\u202ec\n\td\x9b31m"
    monkeypatch.setattr(lm, "generate", lambda *args, **options: iter(lm.tokenizer.encode(hostile)))
    out, turns, _ = converse("hello", is_instruct=False)
    assert "a·]0;title··[2Jb··c\n\td·31m" in out
    assert hostile in turns[0]["reply"]  # the transcript has it as it was


def test_bytes_of_one_character_are_printed_together(lm):
    ids = lm.tokenizer.encode("é日")
    parts = list(chat.pieces(lm, iter(ids)))
    assert "".join(parts) == "é日"
    assert "\ufffd" not in "".join(parts)
    assert len(ids) > 2  # they are spread over several tokens
