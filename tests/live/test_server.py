"""The page's own requests: what is answered, what is refused, and that jobs do not harm each other."""

import html
import json
import threading
import time

import httpx2
import pytest
import torch
from live_runs import EXPLAINED, HOSTILE, F, K, serving
from test_demo import Ran

from mistral_sae.live import asked, batches, looking
from mistral_sae.model.language_model import Row
from mistral_sae.steer import steering, sweep
from mistral_sae.steer.effect import effects_of
from mistral_sae.steer.search import RAISED, Search, changes_of
from mistral_sae.steer.steering import Edit

TEXT = "def load(path):\n    return open(path).read()"
PROMPT = "def load(path):\n"
FIRING = 12  # a feature that fires


def events(response):
    """The items of a stream of server-sent events."""
    return [
        json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")
    ]


def joined(items, name):
    return "".join(item["pieces"][name] for item in items if "pieces" in item)


@pytest.fixture
def steer(known):
    """An edit that changes what is written."""
    feature = int(known.subject.statistics.maximum_F.argmax())
    return {"features": {str(feature): 3.0}}


# ---- look ----


def test_the_page_holds_its_script_and_allows_no_other(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "connect-src 'self'; img-src data:; base-uri 'none'" in html.unescape(page.text)
    assert page.headers["content-security-policy"] == "frame-ancestors 'none'"


def test_the_list_has_every_feature_whether_explained_or_not(client, known):
    columns = client.get("/features").json()
    assert columns["feature"] == list(range(F))
    explained = [feature for feature in range(F) if columns["explanation"][feature]]
    assert explained == sorted(known.subject.explanations)
    assert set(explained) < set(EXPLAINED)
    assert all(len(tokens) == 5 for tokens in columns["logit_lens"])
    fired = [tokens != [] for tokens in columns["fires_on"]]
    assert fired == [maximum > 0 for maximum in columns["maximum"]]


def test_a_feature_without_an_explanation_has_its_passages_all_the_same(client, known):
    feature = next(f for f in range(1, F, 4) if known.listed["maximum"][f] > 0)
    record = client.get(f"/features/{feature}").json()
    assert record["label"] is None
    assert record["top"]
    assert len(record["nearest"]) == len(record["promoted"]) == 10
    assert client.get(f"/features/{F}").status_code == 404


def test_without_a_cache_a_feature_is_what_its_weights_say(known):
    (record,) = looking.page(known._replace(records=None), FIRING)
    assert record["top"] == []
    assert record["nearest"][0][0] == looking_nearest(known, FIRING)


def looking_nearest(known, feature):
    W_FD = torch.nn.functional.normalize(known.subject.loaded.sae.W_dec.detach(), dim=1)
    cosine_F = W_FD @ W_FD[feature]
    cosine_F[feature] = -1
    return int(cosine_F.argmax())


def test_activations_are_those_of_the_autoencoder(client, known):
    found = client.post("/activations", json={"text": TEXT, "top": 3}).json()
    model, loaded, *_ = known.subject
    ids = model.encode(TEXT)
    assert found["ids"] == ids[1:]
    assert found["shape"] == [len(ids) - 1, 3]
    assert "".join(found["tokens"]) == TEXT
    values, indices, *_ = loaded.sae.encode(model.residuals(torch.tensor([ids]), 2)[0, 1:])
    best = values.topk(3, dim=1)
    torch.testing.assert_close(torch.tensor(found["activations"]), best.values)
    assert found["features"] == indices.gather(1, best.indices).tolist()


def test_a_text_is_read_without_gradients(known, monkeypatch):
    sae, with_gradients = known.subject.loaded.sae, []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: with_gradients.append(torch.is_grad_enabled()) or encode(x))
    list(looking.read(known, asked.Reading(text=TEXT)))
    assert with_gradients == [False]


def test_a_text_longer_than_a_row_is_read_in_several(client, known):
    found = client.post("/activations", json={"text": "x = 1\n" * 40}).json()
    assert len(found["ids"]) > known.context
    assert {len(features) for features in found["features"]} == {K}


def test_what_a_feature_changes_is_what_ablating_it_undoes(client, known):
    read = client.post("/activations", json={"text": TEXT}).json()
    position = 5
    feature = read["features"][position][0]
    found = client.post("/effects", json={"text": TEXT, "feature": feature, "position": position}).json()
    assert found["raised"]
    assert found["lowered"]
    model, ids = known.subject.model, torch.tensor([known.subject.model.encode(TEXT)[: position + 2]])
    with Edit({feature: 0.0}, "ablate").context(known.subject, 1):
        without_V = model.forward(ids)[0, -1].softmax(dim=-1)
    as_is_V = model.forward(ids)[0, -1].softmax(dim=-1)
    token = int((as_is_V - without_V).argmax())
    assert found["raised"][0][0] == model.tokenizer.strings([token])[0]
    assert found["raised"][0][1:] == pytest.approx([float(as_is_V[token]), float(without_V[token])], rel=1e-4)


# ---- steer ----


def test_texts_are_streamed_and_are_those_of_generate(client, known, steer):
    items = events(client.post("/texts", json={"prompt": PROMPT, "steer": steer, "max_tokens": 12, "seed": 3}))
    assert len(items) == 12 + 1
    model, ids = known.subject.model, known.subject.model.encode(PROMPT)
    own = list(model.generate(ids, 12, 0.7, seed=3))
    with asked.Steer(**steer).edit().context(known.subject, len(ids)):
        steered = list(model.generate(ids, 12, 0.7, seed=3))
    assert steered != own
    for name, expected in (("own", own), ("steered", steered)):
        assert joined(items, name) == "".join(model.tokenizer.strings([*ids, *expected])[len(ids) :])
        text = items[-1]["texts"][name]
        assert "".join(text["tokens"]) == joined(items, name)
        assert len(text["shares"]) == len(text["tokens"])
        assert text["figures"]["cross_entropy"] > 0


@pytest.mark.parametrize("strength", [0.001, 2.0])
def test_the_verdict_on_a_text_is_that_of_demo_s_measure(client, known, strength):
    subject, feature = known.subject, int(known.subject.statistics.density_F.argmax())
    trials = sweep.Trials(subject.model, subject.loaded, subject.model.encode(PROMPT), [3], 24, 0.7)
    maximum, search = {feature: float(subject.statistics.maximum_F[feature])}, Search(subject, trials, lambda _: None)
    raised_1V = changes_of(subject.model, subject.loaded, maximum, search.text_1T).logits_NV
    classes = {feature: set(raised_1V.topk(RAISED).indices[0].tolist())}
    (seen,) = effects_of(subject, Edit({}), {feature: [strength]}, classes, trials)
    wanted = {"prompt": PROMPT, "steer": {"features": {str(feature): strength}}, "max_tokens": 24, "seed": 3}
    verdict = events(client.post("/texts", json=wanted))[-1]["verdict"]
    assert verdict["visible"] == seen.is_visible
    assert (verdict["strongest"] is not None) == seen.is_fluent
    assert not (seen.is_visible and strength < 1)


def test_an_edit_against_a_feature_is_not_expected_to_show_it(client):
    for steer in ({"features": {str(FIRING): -1}}, {"features": {str(FIRING): 1}, "method": "ablate"}):
        items = events(client.post("/texts", json={"prompt": PROMPT, "steer": steer, "max_tokens": 4}))
        assert items[-1]["verdict"] is None


def test_the_texts_are_those_of_demo_for_the_same_constants(client, live_run, run_script, steer):
    ((feature, strength),) = steer["features"].items()
    named = {"RUN_DIR": live_run[0], "PROMPT": PROMPT, "NEW_TOKENS": 12, "TEMPERATURE": 0.7, "SEED": 4, "DEVICE": "cpu"}
    edit = {"FEATURE_INDEX": feature, "COEFFICIENT": strength, "METHOD": "clamp", "POSITIONS": "generated"}
    ran = Ran(*run_script("demo.py", [f"{name}={value}" for name, value in (named | edit).items()]))
    wanted = {"prompt": PROMPT, "steer": steer | {"positions": "generated"}, "max_tokens": 12, "seed": 4}
    items = events(client.post("/texts", json=wanted))
    assert ran.columns == ["".join(joined(items, name).split()) for name in ("own", "steered")]
    assert ran.columns[0] != ran.columns[1]


def test_a_strength_of_none_of_the_features_leaves_one_text(client):
    items = events(client.post("/texts", json={"prompt": PROMPT, "steer": {}, "max_tokens": 4}))
    assert set(items[-1]["texts"]) == {"own"}


def test_a_rival_writes_a_third_text_and_leaves_the_others_as_they_are(client, steer):
    wanted = {"prompt": PROMPT, "steer": steer, "max_tokens": 8}
    rival = {"toward": ["class A:", "class B(A):"], "away": ["import os", "import sys"], "strength": 2.0}
    without, beside = (events(client.post("/texts", json=wanted | more)) for more in ({}, {"rival": rival}))
    assert joined(without, "steered") == joined(beside, "steered")
    assert joined(beside, "rival") not in (joined(beside, "own"), joined(beside, "steered"))


def test_a_stop_sequence_ends_a_text_before_it(client):
    wanted = {"prompt": PROMPT, "steer": {}, "max_tokens": 12, "temperature": 0}
    whole = joined(events(client.post("/texts", json=wanted)), "own")
    stop = whole[5:8]
    assert joined(events(client.post("/texts", json=wanted | {"stop": [stop]})), "own") == whole[: whole.index(stop)]


def test_a_sweep_ends_with_what_it_found(client, steer):
    wanted = {"prompt": PROMPT, "steer": steer, "texts": 2, "max_tokens": 6}
    none, *rows, verdict = events(client.post("/sweep", json=wanted))
    strengths = [row["strength"] for row in rows]
    assert none["strength"] == 0
    assert strengths == sorted(strengths)
    assert verdict["strongest"] in [None, *strengths]
    assert isinstance(verdict["visible"], bool)
    other = next(f for f in range(99) if str(f) not in steer["features"])
    held = {"features": steer["features"] | {str(other): 0.0}}
    assert [row["strength"] for row in events(client.post("/sweep", json=wanted | {"steer": held}))[1:-1]] == strengths
    against = {"features": {feature: -strength for feature, strength in steer["features"].items()}}
    assert events(client.post("/sweep", json=wanted | {"steer": against}))[-1]["visible"] is None
    refused = client.post("/sweep", json=wanted | {"steer": steer | {"method": "ablate"}})
    assert (refused.status_code, "nothing to sweep over" in refused.text) == (400, True)


# ---- together ----


def test_two_edits_at_once_do_not_meet(client, steer):
    wanted = {"prompt": PROMPT, "steer": steer, "max_tokens": 24, "temperature": 0}
    others = {"prompt": "import os\n", "steer": {"features": {"40": -2.0}, "method": "add"}, "max_tokens": 24}
    alone = [client.post("/texts", json=body).text for body in (wanted, others)]
    together = {}

    def post(i, body):
        together[i] = client.post("/texts", json=body).text

    threads = [threading.Thread(target=post, args=each) for each in enumerate((wanted, others, wanted, others))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(4)] == alone * 2


def test_logits_that_are_not_finite_are_an_error_of_their_own_request(client, steer, monkeypatch):
    wanted = {"prompt": PROMPT, "steer": steer, "max_tokens": 2}
    with monkeypatch.context() as patch:
        patch.setattr(steering, "make_edit", lambda *_, **__: lambda x_BTD: x_BTD * torch.inf)
        failed = client.post("/texts", json=wanted)
    assert failed.status_code == 400
    assert "found NaN or infinity" in failed.json()["error"]["message"]
    assert client.post("/texts", json=wanted).status_code == 200


def test_a_closed_stream_frees_its_place(client, live):
    wanted = {"prompt": PROMPT, "steer": {"features": {str(FIRING): 1}}, "texts": 8, "max_tokens": 64}
    with client.stream("POST", "/sweep", json=wanted) as response:
        lines = response.iter_lines()
        assert "strength" in next(lines)
        assert live.engine.jobs == 1
    deadline = time.monotonic() + 300  # a step of the sweep, however slow the machine
    while live.engine.jobs:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_that_fails_for_want_of_memory_is_refused_and_the_next_one_runs(client, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(looking, "strongest", fail)
        failed = client.post("/activations", json={"text": TEXT})
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, 503)
    assert client.post("/activations", json={"text": TEXT}).status_code == 200


def test_a_fault_is_answered_and_printed_once(known, monkeypatch, capfd):
    monkeypatch.setattr(looking, "strongest", lambda *_: 1 / 0)
    with serving(known) as server, httpx2.Client(base_url=server.address) as client:
        failed = client.post("/activations", json={"text": TEXT})
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "ZeroDivisionError: division by zero")
    assert capfd.readouterr().err.count("Traceback") == 1


# ---- who may ask, and for what ----


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
    ],
)
def test_other_pages_and_other_names_are_refused(client, headers):
    assert client.get("/features", headers=headers).status_code == 403
    assert client.post("/activations", json={"text": TEXT}, headers=headers).status_code == 403


def test_the_own_page_is_no_other(client, live):
    assert client.post("/activations", json={"text": TEXT}, headers={"Origin": live.address}).status_code == 200


def test_a_form_of_another_page_is_no_json(client):
    sent = client.post("/activations", content=json.dumps({"text": TEXT}), headers={"Content-Type": "text/plain"})
    assert sent.status_code == 415


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/activations", {"text": "x" * 300_000}, "text"),
        ("/activations", {"text": ""}, "0 tokens"),
        ("/activations", {"text": "x", "path": "/etc/passwd"}, "path"),
        ("/activations", [], "found []"),
        ("/effects", {"text": "x", "feature": 3, "position": 99}, "position 99"),
        ("/texts", {"prompt": PROMPT, "steer": {"features": {str(F): 1}}}, f"from 0 to {F - 1}"),
        ("/texts", {"prompt": PROMPT, "steer": {"features": {"x": 1}}}, "pattern"),
        ("/texts", {"prompt": PROMPT, "steer": {"features": {str(i): 1 for i in range(17)}}}, "at most 16 items"),
        ("/texts", {"prompt": PROMPT, "steer": {}, "max_tokens": 100_000}, "max_tokens"),
        ("/texts", {"prompt": PROMPT, "steer": {}, "max_tokens": 4096}, "see CHAT_CONTEXT"),
        ("/texts", {"prompt": PROMPT, "steer": {}, "temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_one_line(client, path, body, words):
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "\n" not in message


def test_a_body_without_end_is_refused(client):
    assert client.post("/texts", json={"prompt": "x" * (asked.BODY + 1)}).status_code == 413


def test_elsewhere_nothing_is_answered_without_the_token(known):
    with serving(known, token="secret") as server, httpx2.Client(base_url=server.address) as visitor:
        assert visitor.get("/").status_code == 401
        assert visitor.get("/features", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert visitor.get("/features?token=secret").status_code == 401
        assert visitor.get("/features", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert visitor.get("/?token=secret").status_code == 303
        assert visitor.get("/").status_code == 200  # by the cookie
        own = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
        others = {"Cookie": f'theirs={{"a": 1}}; token=x; a@b=1; {own}'}  # of other servers of this host
        assert httpx2.get(f"{server.address}/", headers=others).status_code == 200
        assert visitor.get("/", headers={"Host": "a.name.of.this.machine"}).status_code == 200


def test_a_hostile_label_is_data(client):
    assert "<img" not in client.get("/").text
    assert "<img" in client.get(f"/features/{HOSTILE}").json()["label"]["explanation"]


def test_text_that_may_become_a_stop_sequence_is_held_back(known):
    tokenizer = known.subject.model.tokenizer
    text = batches.Growing(tokenizer, Row.of([tokenizer.bos_id], 0.0, 0), 100, ["abc"])
    for character in "xababd":
        for id in tokenizer.encode(character):
            text.add(id)
    assert text.take() == "xababd"
    assert text.pieces[1] == text.pieces[2] == ""
    assert text.finish is None
