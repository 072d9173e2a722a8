import asyncio
import time

import pytest
from synthetic_features import make_feature, on
from torch import nn

from mistral_sae.explain.journal import Journal
from mistral_sae.explain.local_client import LocalClient
from mistral_sae.explain.prompts import explain_request
from mistral_sae.explain.types import Request
from mistral_sae.model.language_model import ModelError, load_model

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x = 1"}]


class Tokenizer:
    """Characters as tokens; a chat is its texts, and has a system role if `system`."""

    def __init__(self, system=True):
        self.system, self.seen = system, []

    def chat(self, messages):
        self.seen.append(messages)
        if messages[0]["role"] == "system" and not self.system:
            raise ModelError("no system role")
        return [ord(character) for message in messages for character in message["content"]]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Model:
    """Says `reply`, one character at a time."""

    def __init__(self, reply, pause=0.0, context_length=None, **tokenizer):
        self.reply, self.pause, self.tokenizer = reply, pause, Tokenizer(**tokenizer)
        self.name, self.n_layers, self.context_length = "fake", 2, context_length
        self.last = nn.Linear(2, 2)
        self.running, self.most, self.said = 0, 0, 0

    def block(self, layer):
        assert layer == 1
        return self.last

    def generate(self, ids, max_tokens):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for character in self.reply[:max_tokens]:
                time.sleep(self.pause)
                self.said += 1
                yield ord(character)
        finally:
            self.running -= 1


def complete(completer, request=None):
    return asyncio.run(completer.complete(request or Request(MESSAGES, None, 20)))


def test_a_reply_that_ends_is_ok(journal):
    assert complete(LocalClient(Model("fine"), journal)) == ("ok", "fine", len("be briefx = 1"), 4)
    assert complete(LocalClient(Model("a" * 20), journal)) == ("ok", "a" * 20, len("be briefx = 1"), 20)


def test_a_reply_that_does_not_end_in_time_is_truncated(journal):
    assert complete(LocalClient(Model("a" * 21), journal)) == ("truncated", "a" * 20, 13, 20)
    assert complete(LocalClient(Model("a" * 21, context_length=15), journal)) == ("truncated", "aa", 13, 2)


def test_a_prompt_that_leaves_no_room_is_an_overflow_and_is_not_run(journal):
    model = Model("fine", context_length=13)
    completion = complete(LocalClient(model, journal))
    assert (completion.status, completion.prompt_tokens) == ("overflow", 13)
    assert "13 of 13 tokens" in completion.text
    assert model.said == 0


def test_the_system_message_is_folded_where_the_format_has_no_role_for_it(journal):
    model = Model("fine", system=False)
    completer = LocalClient(model, journal)
    assert complete(completer).status == "ok"
    assert model.tokenizer.seen[-1] == [{"role": "user", "content": "be brief\n\nx = 1"}]


def test_what_was_answered_is_not_generated_again(tmp_path):
    model = Model("fine")
    for _ in range(2):  # two runs
        completer = LocalClient(model, Journal(tmp_path / "completions.jsonl"))
        assert complete(completer) == complete(completer) == ("ok", "fine", 13, 4)
    assert model.said == 4
    nn.init.zeros_(model.last.weight)  # another model
    assert complete(LocalClient(model, Journal(tmp_path / "completions.jsonl"))).text == "fine"
    assert model.said == 8


def test_requests_run_one_at_a_time_and_let_others_run_between_tokens(journal):
    model = Model("abc", pause=0.01)
    completer = LocalClient(model, journal)

    async def work():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticker = asyncio.create_task(tick())
        found = await asyncio.gather(*(completer.complete(Request(MESSAGES, None, 20 + i)) for i in range(4)))
        ticker.cancel()
        return found, ticks

    found, ticks = asyncio.run(work())
    assert [completion.text for completion in found] == ["abc"] * 4
    assert model.said == 12
    assert model.most == 1
    assert ticks > 2


def test_a_reply_that_nobody_waits_for_is_not_finished(journal):
    model = Model("a" * 1000, pause=0.005)

    async def work():
        task = asyncio.create_task(LocalClient(model, journal).complete(Request(MESSAGES, None, 1000)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert model.said < 200


@pytest.mark.parametrize("kind", ["mistral_folder", "hugging_face_folder"])
def test_a_model_of_either_kind_completes_the_chat_that_its_tokenizer_makes(kind, request, journal):
    lm = load_model(request.getfixturevalue(kind), device="cpu")
    asked = Request(MESSAGES, None, 5)
    completion = complete(LocalClient(lm, journal), asked)
    assert completion.status in ("ok", "truncated")
    assert completion.completion_tokens <= 5
    assert completion == complete(LocalClient(lm, Journal(journal.path.with_name("another.jsonl"))), asked)
    prompt = explain_request(make_feature(0, on(" self")))
    lm.context_length = 300
    assert complete(LocalClient(lm, journal), prompt).status == "overflow"


def test_a_tokenizer_without_a_chat_format_ends_the_run(mistral_folder, monkeypatch, journal):
    lm = load_model(mistral_folder, device="cpu")

    def refuse(messages):
        raise ModelError("it has no chat format")

    monkeypatch.setattr(lm.tokenizer, "chat", refuse)
    with pytest.raises(ModelError, match="no chat format"):
        complete(LocalClient(lm, journal))
