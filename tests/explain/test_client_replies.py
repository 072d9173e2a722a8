"""What servers say, and how they want to be asked."""

import asyncio
import json

import pytest
from asking import SCHEMA, ask, lines, opened, request, serve
from openai_server import Raw

from mistral_sae.cli import UserError
from mistral_sae.explain.client import IN_A_ROW

CONTEXT = "This model's maximum context length is 8192 tokens"
pytestmark = pytest.mark.usefixtures("quick_retries")


# ---- statuses ----


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("refusal", "refused", "I'm sorry, I can't help with that."),
        ("filter", "filtered", "the provider's content filter withheld the reply"),
        ("filter-400", "filtered", "content management policy"),
        ("overflow", "overflow", "maximum context length"),
    ],
)
def test_what_asking_again_would_not_change_is_asked_once_and_kept(journal, fault, status, text):
    with serve(lambda asked: fault) as server:
        (completion,), _ = ask(server, journal, "x")
        assert completion.status == status
        assert text in completion.text
        (again,), client = ask(server, journal, "x")
    assert again == completion
    assert "1 answered from the journal" in client.report[-1]
    assert server.outcomes("x") == [fault]


def test_a_truncated_reply_gets_more_room(journal):
    with serve(lambda asked: "truncated" if asked.body["max_tokens"] < 400 else None) as server:
        (completion,), _ = ask(server, journal, "x" * 40)
    assert completion[:2] == ("ok", "about " + "x" * 40)
    assert [served.body["max_tokens"] for served in server.log] == [100, 200, 400]
    assert completion.completion_tokens == 5 + 5 + 11  # of all three


@pytest.mark.parametrize(
    ("larger", "rooms"), [("truncated", [100, 200, 300]), ("overflow", [100, 200]), (Raw(400, {}), [100, 200])]
)
def test_a_reply_that_stays_truncated_says_so(journal, larger, rooms):
    with serve(lambda asked: "truncated" if asked.attempt == 0 else larger) as server:
        (completion,), _ = ask(server, journal, "x", longest_reply=300)
    assert completion[:2] == ("truncated", "abo")
    assert [served.body["max_tokens"] for served in server.log] == rooms
    assert journal.get(lines(journal)[0]["key"]) == completion


def test_a_truncated_reply_is_asked_for_again_under_a_larger_bound_only(journal):
    with serve(lambda asked: "truncated" if asked.body["max_tokens"] < 800 else None) as server:
        (cut,), client = ask(server, journal, "x", longest_reply=400)
        assert cut.status == "truncated"
        assert "raise MAX_REPLY_TOKENS" in client.notes["room"]
        ((again,), _), asked = ask(server, journal, "x", longest_reply=400), len(server.log)
        assert (again, len(server.log)) == (cut, asked)
        ((whole,), _) = ask(server, journal, "x", longest_reply=800)
        assert whole.status == "ok"
        assert ask(server, journal, "x", longest_reply=400)[0] == [whole]


def test_no_reply_is_given_more_room_than_the_bound(journal):
    with serve(lambda asked: "truncated") as server:
        (cut,), _ = ask(server, journal, "x", longest_reply=60)
    assert cut.status == "truncated"
    assert [served.body["max_tokens"] for served in server.log] == [60]


def test_requests_of_a_kind_begin_with_the_room_that_one_of_them_needed(journal):
    async def main():
        async with opened(server, journal) as client:
            return [await client.complete(each) for each in made]

    def fault(asked):
        if asked.content == "small":
            return "overflow" if asked.body["max_tokens"] > 100 else None
        return "truncated" if asked.body["max_tokens"] < 400 else None

    kinds = {"x": "a", "y": "a", "large": "a", "small": "a", "other": "b"}
    made = [request(c, SCHEMA | {"title": kind}, 500 if c == "large" else 100) for c, kind in kinds.items()]
    with serve(fault) as server:
        completions = asyncio.run(main())
        again, client = ask(server, journal, *made)
    rooms = {content: [s.body["max_tokens"] for s in server.log if s.content == content] for content in kinds}
    assert rooms == {
        "x": [100, 200, 400],
        "y": [400],
        "large": [500],
        "small": [400, 100],  # which the room of others is too large for
        "other": [100, 200, 400],
    }
    assert {completion.status for completion in completions} == {"ok"}
    assert again == completions
    assert "5 answered from the journal" in client.report[-1]  # which knows them by what they asked for


@pytest.mark.parametrize(
    ("text", "status"), [('{"a": [1, 2]}' + " \n" * 40, "ok"), ('{"a": [1, 2', "truncated"), ("12", "truncated")]
)
def test_a_reply_cut_off_in_the_white_space_after_its_json_is_whole(journal, text, status):
    body = {"choices": [{"message": {"content": text}, "finish_reason": "length"}]}
    with serve(lambda asked: Raw(200, body)) as server:
        (completion,), _ = ask(server, journal, "x", longest_reply=100)
    assert completion[:2] == (status, text)


def test_a_reply_that_was_cut_off_before_its_first_character_gets_more_room(journal):
    words = (
        "Could not finish the message because max_tokens or model output limit was reached. Please try again with "
        "higher max_tokens."
    )

    def fault(asked):
        return Raw(400, {"error": {"message": words}}) if asked.body["max_tokens"] < 400 else None

    with serve(fault) as server:
        (completion,), client = ask(server, journal, "x")
        (cut,), _ = ask(server, journal, "y", longest_reply=200)
    assert completion[:2] == ("ok", "about x")
    assert [served.body["max_tokens"] for served in server.log] == [100, 200, 400, 100, 200]
    assert completion.completion_tokens == 100 + 200 + 1  # what was cut off may have been charged for
    assert cut[:2] == ("truncated", "the reply was cut off before it began")
    assert client.notes == {}


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        # OpenAI
        (400, {"error": {"message": "Input tokens exceed the configured limit of 272000 tokens."}}, "overflow"),
        (400, {"error": {"message": CONTEXT, "code": "context_length_exceeded"}}, "overflow"),
        (429, {"error": {"message": "Request too large for gpt-4o on tokens per min (TPM)"}}, "overflow"),
        (400, {"error": {"message": "Invalid prompt", "code": "content_policy_violation"}}, "filtered"),
        # Azure
        (400, {"error": {"code": "x", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "filtered"),
        # Mistral
        (400, {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum"}, "overflow"),
        # vLLM, old and new
        (400, {"object": "error", "message": CONTEXT, "type": "BadRequestError", "code": 400}, "overflow"),
        (400, {"error": {"message": "The decoder prompt is longer than the maximum model length of 16"}}, "overflow"),
        (400, {"error": {"message": "Prompt length (9000) exceeds max_model_len (8192)"}}, "overflow"),
        # xAI
        (400, {"error": "This model's maximum prompt length is 131072 but the request contains 140000"}, "overflow"),
        # Bedrock
        (400, {"message": "Input is too long for requested model."}, "overflow"),
        # llama.cpp
        (400, {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}, "overflow"),
        # Ollama
        (400, {"error": "the input length exceeds the context length"}, "overflow"),
        (500, {"error": {"message": "input exceeds context length"}}, "overflow"),
        # TGI
        (422, {"error": "`inputs` must have less than 1024 tokens. Given: 2000"}, "overflow"),
        # nginx
        (413, "<html>Request Entity Too Large</html>", "overflow"),
        # OpenRouter
        (403, {"error": {"message": "Your input was flagged", "code": 403}}, "filtered"),
        (200, {"error": {"message": "Upstream is away", "code": 502}}, "failed"),
        # whatever else
        (400, {"error": {"message": "Conversation roles must alternate"}}, "failed"),
        (409, {}, "failed"),
        (418, "a teapot", "failed"),
        (200, "null", "failed"),
        (200, "[1, 2]", "failed"),
        (200, '"text"', "failed"),
        (200, "[" * 5000, "failed"),
        (200, {"choices": []}, "failed"),
        (200, {"choices": [None]}, "failed"),
        (200, {"choices": "ok"}, "failed"),
        (200, {"choices": [{"message": None, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": [{"type": "text", "text": 5}]}}]}, "failed"),
        (200, {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}, "failed"),
        (200, {"choices": [{"message": {"content": " \n"}, "finish_reason": "stop"}]}, "failed"),
        (200, {"choices": [{"message": {"content": "x"}}], "usage": "much"}, "ok"),
        (200, {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -3}}, "ok"),
        (200, {"choices": [{"message": {"content": [{"type": "thinking"}, {"type": "text", "text": "x"}]}}]}, "ok"),
    ],
)
def test_whatever_a_server_says_becomes_a_status(journal, status, body, expected):
    with serve(lambda asked: Raw(status, body)) as server:
        (completion,), _ = ask(server, journal, "y", attempts=2, after_first=True)
    assert completion.status == expected
    assert completion.text == "x" if expected == "ok" else completion.text
    assert min(completion[2:]) >= 0


def test_an_answer_among_the_thoughts_is_read(journal):
    for field in ("reasoning", "reasoning_content"):
        body = {"choices": [{"message": {"content": None, field: '{"a": 1}'}, "finish_reason": "stop"}]}
        with serve(lambda asked, body=body: Raw(200, body)) as server:
            assert ask(server, journal, field)[0][0][:2] == ("ok", '{"a": 1}')


def streamed(*deltas, end=("[DONE]",), finish="stop", **last):
    """The body of a stream of chat completion chunks."""
    choices = [{"delta": delta, "finish_reason": None} for delta in deltas] + [{"delta": {}, "finish_reason": finish}]
    pieces = [json.dumps({"choices": [choice]}) for choice in choices] + [json.dumps({"choices": []} | last)]
    return "".join(f"data: {piece}\n\n" for piece in (*pieces, *end))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            streamed({"role": "assistant", "content": None}, {"content": "a\u2028"}, {"content": "b"}),
            ("ok", "a\u2028b"),
        ),
        (": WAITING\n\n" + streamed({"content": "a"}), ("ok", "a")),
        (streamed({"reasoning_content": '{"a"'}, {"reasoning_content": ": 1}"}), ("ok", '{"a": 1}')),
        (streamed({"content": "[1, "}, {"content": "2"}, finish="length"), ("truncated", "[1, 2")),
        (
            streamed({"content": "a"}, end=(), finish=None),
            ("failed", "2 attempts failed, the last with a reply that broke"),
        ),
        (
            streamed({"content": "a"}, error={"message": "Overloaded"}),
            ("failed", "2 attempts failed, the last with HTTP"),
        ),
        ({"success": True, "data": {"choices": [{"message": {"content": "a"}}]}}, ("ok", "a")),
    ],
)
def test_an_answer_in_a_stream_or_an_envelope_is_read(journal, body, expected):
    raw = Raw(200, body, {"Content-Type": "text/event-stream"} if isinstance(body, str) else {})
    with serve(lambda asked: raw) as server:
        (completion,), _ = ask(server, journal, "x", attempts=2, longest_reply=100, after_first=True)
    assert completion.status == expected[0]
    assert completion.text.startswith(expected[1])
    assert len(server.outcomes("x")) == 1 + (completion.status == "failed")


def test_the_tokens_of_a_stream_are_its_own_or_estimated(journal):
    bodies = [
        streamed({"content": "abcdefg"}),
        streamed({"content": "a"}, usage={"prompt_tokens": 7, "completion_tokens": 9}),
    ]
    with serve(lambda asked: Raw(200, bodies[asked.content == "counted"])) as server:
        (estimated, counted), _ = ask(server, journal, "estimated", "counted")
    assert estimated[2:] == (3 + 3, 2)
    assert counted[2:] == (7, 9)


@pytest.mark.parametrize(
    ("message", "loops"),
    [
        ({"content": '{"pattern": "' + "the token the and the " * 40}, True),
        ({"content": "{" + "\n" * 200}, True),
        ({"content": "", "reasoning": "Wait, let me look at it again. But then:\n" * 20}, True),
        ({"content": "".join(f"passage {n} has it; " for n in range(60))}, False),
        ({"content": "no no no no"}, False),
    ],
)
def test_a_reply_that_repeats_the_same_until_it_is_cut_off_gets_no_more_room(journal, message, loops):
    body = {"choices": [{"message": message, "finish_reason": "length"}]}
    with serve(lambda asked: Raw(200, body)) as server:
        (completion,), client = ask(server, journal, "x", longest_reply=400)
        assert ask(server, journal, "x", longest_reply=400)[0] == [completion]
    assert completion.status == "truncated"
    assert len(server.log) == (1 if loops else 3)
    assert ("too small" in client.notes.get("loops", "")) == loops


# ---- how servers want to be asked ----


@pytest.mark.parametrize(
    ("rejects", "kinds"),
    [
        ((), ["json_schema"]),
        (("json_schema",), ["json_schema", "json_object"]),
        (("response_format",), ["json_schema", "json_object", None]),
    ],
)
def test_the_best_format_that_a_server_takes_is_found_once(journal, rejects, kinds):
    with serve(rejects=rejects) as server:
        (completion,), client = ask(server, journal, "x", attempts=1)
        assert [served.body.get("response_format", {}).get("type") for served in server.log] == kinds
        assert completion.status == "ok"
        assert len(client.notes) == len(kinds) - 1

        server.log.clear()
        ask(server, journal, *map(str, range(20)), attempts=1, concurrency=4)
    formats = [served.body.get("response_format", {}).get("type") for served in server.log]
    assert formats.count(kinds[-1]) == 20
    assert len(formats) == 20 + len(kinds) - 1


@pytest.mark.parametrize(
    ("length", "counted", "n_notes"),
    [(14_000, 2900, 1), (14_000, 3100, 0), (14_000, 0, 0), (14_000, None, 0), (3000, 100, 0)],
)
def test_a_server_that_leaves_out_most_of_a_prompt_is_said_once(journal, length, counted, n_notes):
    body = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": counted}}
    with serve(lambda asked: Raw(200, body)) as server:
        _, client = ask(server, journal, "x" * length, "y" * length)
    note = (
        "the server read only 2,900 of about 4,000 tokens of a prompt: raise its context length (Ollama: "
        "OLLAMA_CONTEXT_LENGTH)"
    )
    assert list(client.notes.values()) == [note] * n_notes


def test_the_schema_is_sent_as_servers_expect_it(journal):
    with serve() as server:
        ask(server, journal, "x")
        ask(server, journal, request("y", schema=None))
    body, plain = (served.body for served in server.log)
    assert body["response_format"]["json_schema"] == {"name": "reply", "schema": SCHEMA, "strict": True}
    assert "response_format" not in plain
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.0, 100, False)
    assert body["messages"] == request("x").messages


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "'messages' must contain the word 'json' to use 'response_format'"}}),
        (400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}),  # LM Studio
        (404, {"error": {"message": "No endpoints found that support response_format"}}),  # OpenRouter
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format"], "input": "temperature"}]}),
        (422, {"detail": "Unexpected fields in the request: {'format'}"}),
        (500, {"error": {"message": 'response_format type must be one of "text" or "json_object"'}}),  # llama.cpp
        (501, {"error": "structured outputs are not implemented"}),
    ],
)
def test_a_rejected_format_is_understood_in_every_wording(journal, status, body):
    def fault(asked):
        return Raw(status, body) if "response_format" in asked.body else None

    with serve(fault) as server:
        (completion,), _ = ask(server, journal, "x", attempts=1)
    assert completion.status == "ok"
    assert "response_format" not in server.log[-1].body
    assert server.log[-1].body["temperature"] == 0.0


@pytest.mark.parametrize("words", ["Bad Request", "Unknown name 'additionalProperties'", "Invalid schema"])
def test_a_format_that_was_never_answered_is_given_up_whatever_the_words(journal, words):
    refused = Raw(400, {"error": {"message": words}})
    with serve(lambda asked: refused if "response_format" in asked.body else None) as server:
        (completion,), client = ask(server, journal, "x")
    assert completion.status == "ok"
    assert len(client.notes) == 2
    with serve(lambda asked: refused if asked.content == "y" else None) as server:
        (answered, refused_later), client = ask(server, journal, "z", "y", concurrency=1)
    assert (answered.status, refused_later.status, client.notes) == ("ok", "failed", {})


def test_the_parameters_of_reasoning_models_are_found_out(journal):
    with serve(rejects=["max_tokens", "temperature"]) as server:
        (completion,), client = ask(server, journal, "x", attempts=1, sampling={"temperature": 0.0, "seed": 3})
        ask(server, journal, "y", attempts=1, sampling={"temperature": 0.0, "seed": 3})
    assert completion.status == "ok"
    assert server.log[2].body["max_completion_tokens"] == 100
    assert server.log[2].body["seed"] == 3
    assert not {"max_tokens", "temperature"} & set(server.log[2].body)
    assert list(client.notes.values()) == [
        "the server does not take max_tokens: asking with max_completion_tokens",
        "the server does not take temperature: asking without it",
    ]
    assert len(server.log) == 6  # a new client finds it out again


@pytest.mark.parametrize(
    "words",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "Only user and assistant roles are supported!",
    ],
)
@pytest.mark.parametrize("status", [400, 500])  # 500 is llama.cpp's
def test_a_server_without_a_system_role_gets_its_text_from_the_user(journal, words, status):
    def refuse(asked):
        if asked.messages[0]["role"] == "system":
            return Raw(status, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
        return None

    with serve(refuse) as server:
        results, client = ask(server, journal, "x", *map(str, range(10)), attempts=1)
    assert {result.status for result in results} == {"ok"}
    assert server.log[-1].body["messages"][0]["content"].startswith("Describe.\n\n")
    assert [len(served.body["messages"]) for served in server.log].count(1) == 11
    assert server.log[-1].body["response_format"]["type"] == "json_schema"  # the format was not to blame
    assert len(client.notes) == 1


def test_a_server_that_only_fails_is_asked_without_a_system_message_and_then_left(journal):
    with serve(lambda asked: "500" if len(asked.messages) > 1 else None) as server:
        results, client = ask(server, journal, "x", "y", attempts=2)
    assert {result.status for result in results} == {"ok"}
    assert list(client.notes) == ["a system message"]
    assert [len(served.body["messages"]) for served in server.log] == [2, 2, 1, 1]  # attempts, requests

    with serve(lambda asked: "500") as server:
        results, client = ask(server, journal, *map(str, range(50)), attempts=2)
    assert {type(result) for result in results[IN_A_ROW:]} == {UserError}
    assert f"{IN_A_ROW} requests in a row had 2 attempts failed, the last with HTTP 500: Not now" in client.stopped
    assert len(server.log) == 2 + 2 * IN_A_ROW
