"""What OpenAI's own client gets from the server."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import openai
import pytest
import torch
from live_runs import F

from mistral_sae.steer.steering import Edit

PROMPT = "def load(path):\n"
LIKELIEST = {"model": "", "temperature": 0, "max_tokens": 10}


@pytest.fixture
def api(live):
    with openai.OpenAI(base_url=f"{live.address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def edit(known):
    return Edit({int(known.subject.statistics.maximum_F.argmax()): 3.0})


@pytest.fixture
def steer(edit):
    return {"steer": {"features": {str(feature): c for feature, c in edit.coefficients.items()}}}


def generated(known, ids, edit=None):
    model = known.subject.model
    if edit is None:
        found = list(model.generate(ids, 10))
    else:
        with edit.context(known.subject, len(ids)):
            found = list(model.generate(ids, 10))
    return "".join(model.tokenizer.strings([*ids, *found])[len(ids) :])


def test_a_completion_is_the_model_s_own_and_with_steer_the_steered_one(api, known, edit, steer):
    ids = known.subject.model.encode(PROMPT)
    own = api.completions.create(prompt=PROMPT, **LIKELIEST)
    steered = api.completions.create(prompt=PROMPT, extra_body=steer, **LIKELIEST)
    assert own.choices[0].text == generated(known, ids)
    assert steered.choices[0].text == generated(known, ids, edit) != own.choices[0].text
    assert own.usage.prompt_tokens == len(ids)
    assert own.choices[0].finish_reason in ("stop", "length")
    assert api.models.list().data[0].id == own.model


def test_a_stream_joins_to_the_whole(api, steer):
    whole = api.completions.create(prompt=PROMPT, extra_body=steer, **LIKELIEST)
    chunks = list(api.completions.create(prompt=PROMPT, extra_body=steer, stream=True, **LIKELIEST))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 3


def test_several_prompts_and_several_texts_of_each_come_in_order(api, known):
    prompts = [PROMPT, known.subject.model.encode("import os\n")]
    with pytest.raises(openai.BadRequestError, match="found prompt"):
        api.completions.create(prompt=prompts, **LIKELIEST)  # of one kind, as OpenAI has it
    prompts = [known.subject.model.encode(PROMPT), prompts[1]]
    answer = api.completions.create(prompt=prompts, n=2, **LIKELIEST)
    expected = [generated(known, ids) for ids in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_seed_means_the_same_text(api):
    sampled = {"model": "", "prompt": PROMPT, "temperature": 1.5, "max_tokens": 12}
    texts = [api.completions.create(seed=seed, **sampled).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_log_probabilities_of_a_prompt_are_the_edited_model_s(api, known, edit, steer):
    """As lm-eval asks for them: token ids, echo, one token to generate, which it cuts off."""
    model, ids = known.subject.model, known.subject.model.encode(PROMPT + "    return path\n")
    options = {"model": "", "prompt": [ids[1:]], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    (choice,) = api.completions.create(extra_body=steer, **options).choices
    with edit.context(known.subject, len(ids)):
        log_TV = model.log_probabilities(torch.tensor([ids]))[0]
    found = choice.logprobs
    expected = log_TV.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(found.token_logprobs[:-1]), expected, rtol=1e-3, atol=1e-4)
    assert found.tokens[:-1] == model.tokenizer.strings(ids[1:])
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    greedy = [max(each, key=each.get) == token for each, token in zip(found.top_logprobs, found.tokens, strict=True)]
    assert greedy[:-1] == (log_TV.argmax(dim=1) == torch.tensor(ids[1:])).tolist()
    assert greedy[-1]
    (choice,) = api.completions.create(extra_body=steer, **options | {"prompt": [ids]}).choices  # with its BOS
    assert choice.logprobs.token_logprobs == [None, *found.token_logprobs]
    assert choice.logprobs.tokens[1:] == found.tokens


def test_a_chat_of_a_model_without_a_format_continues_the_lines(api, known):
    turns = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "import re"}]
    turns.append({"role": "user", "content": [{"type": "text", "text": "import"}]})
    ids = known.subject.model.encode("import os\nimport re\nimport\n")
    (choice,) = api.chat.completions.create(messages=turns, **LIKELIEST).choices
    assert choice.message.content == generated(known, ids)
    chunks = api.chat.completions.create(messages=turns, stream=True, **LIKELIEST)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == choice.message.content


def test_stop_sequences_end_a_completion(api):
    whole = api.completions.create(prompt=PROMPT, **LIKELIEST).choices[0].text
    (choice,) = api.completions.create(prompt=PROMPT, stop=whole[4:6], **LIKELIEST).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(whole[4:6])], "stop")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"steer": {"features": {str(F): 1}}}, f"from 0 to {F - 1}"),
        ({"steer": {"features": {"3": 1}, "method": "push"}}, "clamp"),
        ({"steer": {"feature": 3}}, "feature"),
        ({"max_tokens": 4000}, "CHAT_CONTEXT"),
        ({"n": 1000}, "16"),
        ({"stream": True, "logprobs": 1}, "logprobs"),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_the_client_s(api, body, words):
    with pytest.raises(openai.BadRequestError, match=words):
        api.completions.create(prompt=PROMPT, model="", extra_body=body)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_of_no_token_is_an_error_of_the_client_s(api, name):
    with pytest.raises(openai.BadRequestError, match=name):
        api.chat.completions.create(messages=[{"role": "user", "content": "import"}], model="", extra_body={name: 0})


# ---- what docs/live.md shows ----

PAGE = (Path(__file__).parent.parent.parent / "docs/live.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)).splitlines())
def test_the_curl_lines_of_the_page_are_answered(live, line):
    command = shlex.split(line.replace("http://127.0.0.1:8000", live.address))
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)
    assert "error" not in answer
    assert {"choices", "feature", "shape"} & answer.keys()


def test_the_lines_of_python_of_the_page_run(live):
    (code,) = re.findall(r"^```py\n(.*?)^```$", PAGE, re.M | re.S)
    exec(code.replace("http://127.0.0.1:8000", live.address), {"openai": openai})


def test_the_page_names_the_columns_of_the_list(known):
    named = re.findall(r"`(\w+)`", PAGE[PAGE.index("- `/features`: the columns") : PAGE.index("`/features/12` is")])
    assert set(named) <= known.listed.keys()
    assert len(named) == 7
