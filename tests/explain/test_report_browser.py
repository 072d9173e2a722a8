"""The report in a real browser. Needs chromium and its driver (apt-get install chromium chromium-driver)."""

import time

import pytest
from chromium import NARROW, WIDE, assert_fits, find, find_all, press, resize, text, visit, wait
from report_records import TOKENS, make_feature, make_label, make_run
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mistral_sae.explain.report import INDEXED, write_report, write_text_page
from mistral_sae.explain.types import Concept, Example
from mistral_sae.model.tokenizer import texts_of

pytestmark = pytest.mark.usefixtures("quiet_console")

N = 120
EXPLAINED = [index for index in range(N) if index % 7 and index % 10 < 8]
TOLD = EXPLAINED[20]  # which tells a concept
HOSTILE = [
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    '<img src=x onerror="window.pwned=1">',
    "'\"><svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "nul\x00nul",
    "\u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd",
    "line\u2028separator",
    "\U0001f469\u200d\U0001f680",
    "half\ud83d",
    "a" * 10_000,
    *texts_of([b"<img src=x onerror=window.pwned=1>" + b"b" * 10_000_000]),  # as tokens are, before they come to a page
]
# Drawn as signs and not as themselves, and half a pair as what stands for one
AS_SIGNS = {0: "", 0x202E: "", 0x202C: "", 0x2028: "", 0xD83D: "\ufffd"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The address of a report of N features, of which some are dead, unexplained or not labelled."""
    labels = {index: make_label(index) for index in range(N) if index % 7}
    labels[TOLD] = labels[TOLD]._replace(concept=Concept("number", 0.765, 11.2, 0.4), is_beside=True)
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_run(N + 5), (make_feature(index, N + 5) for index in range(N)), labels)
    return path.as_uri()


@pytest.fixture
def page(browser, report):
    """The browser, with the report as it opens."""
    visit(browser, report)
    return browser


def listed(browser):
    """The features whose lines are drawn, from the top."""
    hrefs = "return [...document.querySelectorAll('.line a')].map((a) => Number(a.hash.split('=')[1]))"
    return browser.execute_script(hrefs)


def matches(browser, expected):
    wait(browser, f"document.getElementById('matches').textContent.startsWith('{expected}')")


def clearness(feature):
    label = make_label(feature)
    return label.scores["detection"].value - 0.05 * label.explanation.partition("; weakly ")[0].count("; ")


def detection(feature):
    return make_label(feature).scores["detection"].value


def search(browser, words, found):
    """Type words to search for, and wait until the list says how many it has."""
    find(browser, "#search").clear()
    find(browser, "#search").send_keys(words)
    matches(browser, found)


def choose(browser, identity, value):
    values = [option.get_attribute("value") for option in find_all(browser, f"#{identity} option")]
    find(browser, f"#{identity}").send_keys(Keys.HOME, Keys.ARROW_DOWN * values.index(value))


def open_feature(browser, report, feature):
    visit(browser, f"{report}#feature={feature}")
    assert f"Feature {feature}" in text(browser, ".eyebrow")


# ---- the list ----


def test_the_report_opens_on_the_run_beside_the_list(page):
    assert find(page, "#run").is_displayed()
    assert f"What {N + 5} features see" in find(page, "h1").text
    assert text(page, "#matches") == f"{N} features"
    assert len(find_all(page, "#run svg")) == 9
    assert listed(page)[:9] == sorted(EXPLAINED, key=lambda f: (f == TOLD, clearness(f)), reverse=True)[:9]


def test_a_feature_that_tells_a_concept_says_how_well_in_words(browser, report):
    open_feature(browser, report, TOLD)
    said = f"76.5% of the tokens where it fires are {make_label(TOLD).explanation}, 11.2 times as many as by chance"
    assert said in text(browser, "#feature header")


def test_searching_words_narrows_the_list(page):
    choose(page, "scope", "explanation")
    expected = [i for i in EXPLAINED if i % 5 == 1 and "3" in make_label(i).explanation]
    search(page, "RANGE case 3", f"{len(expected)} of {N} ")
    assert sorted(listed(page)) == expected


def test_a_token_is_searched_for_as_it_is_spelt(page):
    choose(page, "scope", "fires")
    place = TOKENS.index(" raise")
    search(page, '" raise"', f"{len(range(place, N, len(TOKENS)))} of {N} ")
    assert {feature % len(TOKENS) for feature in listed(page)} == {place}
    search(page, '"raise"', f"0 of {N} ")


def test_a_score_that_rounds_to_zero_has_no_sign(page):
    shown = page.execute_script("return [-0.001, -0.006, 0, -1, null].map(two)")
    assert shown == ["0.00", "\u22120.01", "0.00", "\u22121.00", "\u2013"]


def test_a_feature_is_found_by_its_number(page):
    search(page, "#77", "1 of")
    assert listed(page) == [77]


def test_no_match_says_so_and_offers_the_way_back(page):
    search(page, "quaternion<b>", "0 of")
    assert find(page, "#empty p").text == "No features match “quaternion<b>”."
    find(page, "#clear").click()
    matches(page, f"{N} features")
    assert not find(page, "#empty").is_displayed()


@pytest.mark.parametrize(
    ("identity", "value", "holds"),
    [
        ("explained", "yes", lambda i: i in EXPLAINED),
        ("explained", "no", lambda i: i not in EXPLAINED),
        ("alive", "dead", lambda i: i % 10 == 9),
        ("alive", "alive", lambda i: i % 10 != 9),
        ("kind", "input", lambda i: i % 10 != 9),
        ("kind", "output", lambda i: i % 5 == 0),
        ("kind", "neither", lambda i: i % 10 == 9),
    ],
)
def test_filters_leave_what_they_say(page, identity, value, holds):
    choose(page, "sort", "feature")
    choose(page, identity, value)
    expected = [i for i in range(N) if holds(i)]
    matches(page, f"{len(expected)} of {N} ")
    assert listed(page) == expected[: len(listed(page))]


def test_features_below_a_score_can_be_left_out(page):
    find(page, "#least").send_keys("0.9")
    high = [i for i in EXPLAINED if round(detection(i), 3) >= 0.9]
    matches(page, f"{len(high)} of {N} ")
    assert set(listed(page)) <= set(high)


@pytest.mark.parametrize("key", ["density", "maximum"])
def test_the_list_is_sorted_and_reversed(page, key):
    choose(page, "sort", key)
    by_value = sorted(range(N), key=lambda i: (-float(f"{getattr(make_feature(i), key):.3g}"), i))
    wait(page, f"document.querySelector('.line a').hash === '#feature={by_value[0]}'")
    drawn = listed(page)
    assert drawn == by_value[: len(drawn)]
    find(page, "#reverse").click()
    assert getattr(make_feature(listed(page)[0]), key) == 0


def test_what_has_no_score_comes_last_in_both_directions(page):
    choose(page, "sort", "score")
    assert listed(page)[0] == max(EXPLAINED, key=detection)
    find(page, "#reverse").click()
    assert listed(page)[0] == min(EXPLAINED, key=detection)
    page.execute_script("document.getElementById('list').scrollTop = 1e9")
    wait(page, "document.querySelectorAll('.line').length === document.querySelectorAll('.none').length")


# ---- a feature ----


def test_a_click_opens_a_feature_and_the_back_button_returns(page):
    feature = listed(page)[2]
    find_all(page, ".line a")[2].click()
    wait(page, "!document.getElementById('feature').hidden")
    assert find(page, "#feature h1").text == make_label(feature).explanation
    assert page.current_url.endswith(f"#feature={feature}")
    assert page.title == f"Feature {feature}: {make_label(feature).explanation}"
    page.back()
    wait(page, "document.getElementById('feature').hidden")
    assert find(page, "#run").is_displayed()


def test_a_link_shows_all_of_a_feature(browser, report):
    open_feature(browser, report, 25)
    feature, label, shown = make_feature(25, N + 5), make_label(25), text(browser)
    score = label.scores["detection"]
    for words in (
        label.explanation,
        "explained by offline, without a model",
        "output feature",
        f"{score.value:.2f} {score.low:.2f} to {score.high:.2f}",
        "24 of 25",
        f"{feature.maximum:.3g}",
        "python demo.py RUN_DIR=runs/standin FEATURE_INDEX=25",
        "75\u2013100% of the maximum",
        "detection: 22 of 23 right, 1 without an answer",
        "✗ wrongheld-out passage: fires, judged: does not fire",
        "✓ righthard negative: does not fire, judged: does not fire",
        "\u2013 no answerhard negative: does not fire",
        "✗ wrongheld-out passage: marks are moved, judged: marks are right",
        "#26 loops over a range, case 26",
    ):
        assert words in shown, words
    assert len(find_all(browser, ".bar")) == 50
    shares = [text(browser, f".columns section:nth-child({n}) .number") for n in (1, 2, 3, 4)]
    assert shares == ["+3.00", "\u22123.00", "0.60", "54%"]
    columns = ["Logit lens: raised", "Logit lens: lowered", "Nearest", "Fires together with"]
    assert [element.text for element in find_all(browser, ".columns h3")] == columns
    sizes = [len(section.find_elements(By.TAG_NAME, "li")) for section in find_all(browser, ".columns section")]
    assert sizes == [len(feature.promoted), len(feature.suppressed), 5, 5]
    groups = browser.execute_script("return [...document.querySelectorAll('details')].map((one) => one.textContent)")
    assert len(groups) == 1 + 4 + 2
    assert groups[0].count("top") == 8
    for interval, group in enumerate(reversed(groups[1:5])):
        assert [n for n in range(12) if f"spread{n}.py" in group] == [3 * interval + step for step in range(3)]


def test_pointing_at_a_token_shows_its_value(browser, report):
    open_feature(browser, report, 25)
    example = make_feature(25).top[0]
    token = find(browser, ".example .t[data-level='4']")
    ActionChains(browser).scroll_to_element(token).move_to_element(token).perform()
    wait(browser, "!document.getElementById('tip').hidden")
    assert find(browser, "#tip").text == f"{example.strength:.3g}, 100% of the maximum"
    ActionChains(browser).move_to_element(find(browser, ".brand")).perform()
    wait(browser, "document.getElementById('tip').hidden")


def test_the_arrow_keys_show_values_too(browser, report):
    open_feature(browser, report, 25)
    browser.execute_script("document.querySelector('.passage').focus()")
    press(browser, Keys.ARROW_RIGHT)
    first = find(browser, "#tip").text
    assert first.endswith("of the maximum")
    press(browser, Keys.ARROW_RIGHT)
    wait(browser, f"!['', '{first}'].includes(document.getElementById('tip').textContent)")


def test_tokens_are_shaded_and_underlined_by_their_activation(browser, report):
    open_feature(browser, report, 25)
    script = """return [...document.querySelector('.passage').querySelectorAll('.t')].map((t) => {
        const style = getComputedStyle(t);
        return [t.dataset.level ?? null, style.textDecorationThickness, style.backgroundColor]})"""
    drawn = browser.execute_script(script)
    thickness = {level: size for level, size, _ in drawn}
    silent = {colour for level, _, colour in drawn if level is None}
    assert len(silent) == 1
    assert silent.isdisjoint(colour for level, _, colour in drawn if level)
    assert len(thickness) == len(set(thickness.values())) >= 2


def test_more_context_shows_the_whole_passage_and_folds_again(browser, report):
    open_feature(browser, report, 25)
    example = make_feature(25).top[0]
    shown = example.tokens[example.peak - 16 : example.peak + 9]
    spelt = "return [...document.querySelector('.example').querySelectorAll('.t')].map((t) => t.textContent).join('')"
    assert browser.execute_script(spelt) == "".join(shown)
    browser.execute_script("document.querySelector('.more').click()")
    assert browser.execute_script(spelt) == "".join(example.tokens)
    browser.execute_script("document.querySelector('.more').click()")
    assert browser.execute_script(spelt) == "".join(shown)


def test_spaces_and_line_breaks_can_be_seen(browser, report):
    open_feature(browser, report, 25)
    assert "radial-gradient" in find(browser, ".passage .space").value_of_css_property("background-image")
    content = "return getComputedStyle(document.querySelector('.passage .sign[data-sign=\"⏎\"]'), '::before').content"
    assert browser.execute_script(content) == '"⏎"'


def test_the_command_that_steers_with_a_feature_can_be_copied(browser, report):
    open_feature(browser, report, 25)
    find(browser, ".code button").click()
    wait(browser, "document.querySelector('.code button').textContent === 'Copied'")
    find(browser, "#search").send_keys(Keys.CONTROL, "v")
    assert find(browser, "#search").get_property("value") == "python demo.py RUN_DIR=runs/standin FEATURE_INDEX=25"


def test_only_features_in_the_report_are_linked_and_opened(browser, report):
    open_feature(browser, report, 25)
    browser.execute_script("document.querySelector('.columns a[href=\"#feature=26\"]').click()")
    wait(browser, "document.querySelector('.eyebrow').textContent === 'Feature 26'")
    open_feature(browser, report, N - 2)
    assert f"#{N} not here" in text(browser)
    assert not find_all(browser, f"a[href='#feature={N}']")
    visit(browser, f"{report}#feature=99999")
    assert text(browser, "#feature h1") == "There is no feature 99999 here"


def test_a_feature_that_is_not_in_the_report_has_a_small_page(browser, tmp_path):
    others = {name: [None] for name in INDEXED}
    others |= {"feature": [9], "explanation": [""], "density": [0.001], "maximum": [2.0]}
    others |= {"fires_on": [[" raise"]], "logit_lens": [["Error"]]}
    features = [make_feature(8)._replace(nearest=((9, 0.5),)), make_feature(1)]
    write_report(tmp_path / "report.html", make_run(), features, {1: make_label(1)}, others)
    open_feature(browser, (tmp_path / "report.html").as_uri(), 8)
    assert listed(browser) == [1]  # those that are explained, to begin with
    find(browser, "#feature a[href='#feature=9']").click()
    wait(browser, "document.querySelector('.eyebrow').textContent === 'Feature 9'")
    for words in ("Not explained", "0.1%", "Fires on raise", "RaisesError", "FEATURE_INDEX=9"):
        assert words in text(browser), words
    find(browser, "#search").send_keys("error")
    choose(browser, "explained", "")
    matches(browser, "1 of 3 ")


def test_a_feature_without_an_explanation_says_why(browser, report):
    open_feature(browser, report, 18)
    assert "the explainer found no pattern: nothing in common" in text(browser)
    open_feature(browser, report, 19)
    assert "it never fired on the corpus" in text(browser)
    open_feature(browser, report, 14)
    assert text(browser, "#feature h1") == "Not explained"
    assert not find_all(browser, "#feature .notice")


# ---- keys ----


def test_the_report_can_be_read_with_the_keyboard_alone(page):
    order = listed(page)
    press(page, "j", "j", "j", "k")
    focused = "return document.activeElement.hash"
    assert page.execute_script(focused) == f"#feature={order[1]}"
    press(page, Keys.ENTER)
    wait(page, "!document.getElementById('feature').hidden")
    assert f"Feature {order[1]}" == text(page, ".eyebrow")
    press(page, "j")
    wait(page, f"document.querySelector('.eyebrow').textContent === 'Feature {order[2]}'")
    press(page, Keys.ESCAPE)
    wait(page, "document.getElementById('feature').hidden")
    assert page.execute_script(focused) == f"#feature={order[2]}"
    press(page, "/")
    press(page, "jk?")  # are letters here
    assert find(page, "#search").get_property("value") == "jk?"
    press(page, Keys.ESCAPE, "?")
    assert find(page, "#help").is_displayed()
    press(page, "j", Keys.ESCAPE)
    assert not find(page, "#help").is_displayed()


def test_a_random_feature_is_one_of_those_found(page):
    search(page, "#77", "1 of")
    press(page, Keys.ESCAPE, "r")
    wait(page, "location.hash === '#feature=77'")


# ---- sizes and colours ----


@pytest.mark.parametrize("fragment", ["", "#features", "#feature=25", "#feature=19"])
@pytest.mark.parametrize("width", [NARROW, 768, WIDE])
def test_nothing_is_wider_than_the_screen(browser, report, fragment, width):
    resize(browser, width)  # before it is drawn
    visit(browser, report + fragment)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert_fits(browser, width)


def test_a_narrow_screen_shows_one_thing_at_a_time(browser, report):
    resize(browser, NARROW)
    visit(browser, report)
    parts = [find(browser, selector) for selector in ("#run", "#browser", "#feature")]
    assert [part.is_displayed() for part in parts] == [True, False, False]
    press(browser, "/")
    wait(browser, "document.activeElement.id === 'search'")
    assert [part.is_displayed() for part in parts] == [False, True, False]
    press(browser, "#77", Keys.ENTER)
    wait(browser, "document.activeElement.hash === '#feature=77'")
    press(browser, Keys.ENTER)
    wait(browser, "!document.getElementById('feature').hidden")
    assert [part.is_displayed() for part in parts] == [False, False, True]
    press(browser, Keys.ESCAPE)
    wait(browser, "document.activeElement.hash === '#feature=77'")


def test_the_page_follows_the_system_into_the_dark(browser, report):
    backgrounds = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        visit(browser, report)
        backgrounds.append(find(browser, "html").value_of_css_property("background-color"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark = (sum(int(part) for part in colour[5:].split(",")[:3]) for colour in backgrounds)
    assert light > 600
    assert dark < 150


def test_a_feature_prints_without_the_list(browser, report):
    open_feature(browser, report, 25)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not find(browser, "#browser").is_displayed()
    assert find(browser, "#feature h1").is_displayed()
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert not find_all(browser, "details:not([open])")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


# ---- hostile text ----


def hostile_feature(index):
    feature = make_feature(index)
    passage = Example(HOSTILE[0], 1, tuple(HOSTILE), (0.0, 2.0) + (1.0,) * (len(HOSTILE) - 2))
    named = tuple((token, 1.0) for token in HOSTILE)
    passages = dict.fromkeys(("top", "spread", "held_out", "random", "hard"), (passage,))
    return feature._replace(maximum=2.0, promoted=named, suppressed=named, **passages)


def hostile_label(index):
    label, words = make_label(index), "".join(HOSTILE[:-2])
    judgements = tuple(judgement._replace(index=0) for judgement in label.judgements)
    return label._replace(explanation=words, explainer=words, reason=words, status="failed", judgements=judgements)


def test_hostile_text_is_shown_and_runs_nothing(browser, tmp_path):
    run = make_run()._replace(**dict.fromkeys(("model", "corpus", "sae_path", "hook_name"), "".join(HOSTILE[:8])))
    features = [hostile_feature(index) for index in range(3)]
    write_report(tmp_path / "report.html", run, features, {1: hostile_label(1)})
    visit(browser, (tmp_path / "report.html").as_uri())
    assert text(browser, "#run").count(HOSTILE[1]) == 4
    press(browser, "j")
    search(browser, "<img src=x", "3 of 3")
    for feature in (0, 1):
        open_feature(browser, (tmp_path / "report.html").as_uri(), feature)
        browser.execute_script("document.querySelectorAll('.more').forEach((button) => button.click())")
        shown = text(browser)
        for words in HOSTILE:
            assert words.translate(AS_SIGNS) in shown
        signs = "return [...document.querySelectorAll('.example .sign')].map((one) => one.dataset.sign)"
        assert {"U+0000", "U+202E", "U+202C", "U+2028"} <= set(browser.execute_script(signs))
        assert not find_all(browser, "main script, main img, main svg[onload], main a[href^='javascript']")
        assert_fits(browser, WIDE, NARROW)
    assert browser.execute_script("return window.pwned") is None


def test_a_token_that_turns_the_direction_does_not_turn_its_neighbours(browser, tmp_path):
    tokens = ("abc", "\u05e9\u05dc\u05d5\u05dd", " ", "123")  # digits after Hebrew would go to its left
    passage = Example("d", 1, tokens, (0.0, 1.0, 0.0, 0.0))
    write_report(tmp_path / "report.html", make_run(), [make_feature(1)._replace(top=(passage,))], {})
    open_feature(browser, (tmp_path / "report.html").as_uri(), 1)
    lefts = "return [...document.querySelectorAll('.passage')[0].querySelectorAll('.t')].map((t) => t.offsetLeft)"
    assert browser.execute_script(lefts) == sorted(browser.execute_script(lefts))


def test_the_policy_stops_markup_that_gets_in_all_the_same(page):
    page.execute_script(
        """document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.pwned=1">');
        const script = document.createElement('script');
        script.textContent = 'window.pwned = 1';
        document.body.append(script);"""
    )
    wait(page, "document.querySelector('body > img').complete")
    assert page.execute_script("return window.pwned") is None
    assert len(page.get_log("browser")) >= 2  # the refusals


# ---- many features, half a file, a text ----


def test_a_report_of_20000_features_opens_and_scrolls(browser, tmp_path):
    n, model = 20_000, make_feature(1)
    passages = {"spread": (), "held_out": (), "random": (), "hard": (), "top": model.top[:1]}
    features = (model._replace(feature=index, **passages) for index in range(n))
    write_report(tmp_path / "report.html", make_run(), features, {})
    visit(browser, (tmp_path / "report.html").as_uri())
    assert text(browser, "#matches") == "20,000 features"
    for step in range(1, 8):
        browser.execute_script(f"document.getElementById('list').scrollTop = {100_000 * step}")
        wait(browser, f"Number(document.querySelector('.line a').hash.slice(9)) > {1000 * step}")
        assert len(find_all(browser, ".line")) < 50
    browser.execute_script("document.getElementById('list').scrollTop = 1e9")
    wait(browser, "[...document.querySelectorAll('.line a')].at(-1).hash === '#feature=19999'")
    assert len(find_all(browser, ".line")) < 50
    find_all(browser, ".line a")[-1].click()
    wait(browser, "document.querySelector('.eyebrow').textContent === 'Feature 19999'")


def test_a_feature_whose_data_is_still_coming_waits_unless_another_is_asked_for(page):
    page.execute_script(
        """window.late = document.getElementById('chunk-2'), window.after = late.nextElementSibling;
        late.remove();
        Object.defineProperty(document, 'readyState', { value: 'loading' });
        location.hash = '#feature=70';"""
    )
    time.sleep(0.2)
    assert not find(page, "#feature").is_displayed()
    page.execute_script("location.hash = '#feature=1'")
    wait(page, "!document.getElementById('feature').hidden")
    page.execute_script("after.before(late)")
    time.sleep(0.2)
    assert text(page, ".eyebrow") == "Feature 1"
    page.execute_script("late.remove(); location.hash = '#feature=70'")
    time.sleep(0.2)
    assert text(page, ".eyebrow") == "Feature 1"
    page.execute_script("after.before(late)")
    wait(page, "document.querySelector('.eyebrow').textContent === 'Feature 70'")


def test_a_report_that_was_cut_short_says_so(browser, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, make_run(), (make_feature(index) for index in range(100)), {})
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'id="chunk-2"') + 1000])
    visit(browser, path.as_uri() + "#feature=99")
    assert "The file is cut short" in text(browser)
    open_feature(browser, path.as_uri(), 1)


def test_a_text_shows_its_features_token_by_token(browser, tmp_path):
    tokens = [(HOSTILE[1], ((3, 2.0), (4, 1.0))), (" x", ((4, 3.0),)), ("\n", ())]
    known = [hostile_feature(3)._replace(maximum=4.0), hostile_feature(4)._replace(maximum=3.0)]
    write_text_page(tmp_path / "text.html", "a model", 2, tokens, {3: hostile_label(3)}, known)
    visit(browser, (tmp_path / "text.html").as_uri())
    hrefs = "return [...document.querySelectorAll('#firing a')].map((a) => a.getAttribute('href'))"
    assert browser.execute_script(hrefs) == ["report.html#feature=4", "report.html#feature=3"]
    assert text(browser, "#text") == "".join(token for token, _ in tokens)
    find_all(browser, "#text .t")[0].click()
    assert [token.text for token in find_all(browser, ".chosen")] == [HOSTILE[1]]
    assert browser.execute_script(hrefs) == ["report.html#feature=3", "report.html#feature=4"]
    assert "50% of its maximum" in text(browser, "#firing")
    assert "fires on " in text(browser, "#firing")
    assert HOSTILE[2] in text(browser, "#firing")
    find_all(browser, "#firing button")[1].click()
    levels = "return [...document.querySelectorAll('#text .t')].map((t) => t.dataset.level ?? null)"
    assert browser.execute_script(levels) == ["2", "4", None]
    press(browser, Keys.ESCAPE)
    assert browser.execute_script(levels) == ["2", "4", None]
    assert text(browser, "#firing-title") == "Strongest in the text"
    assert_fits(browser, WIDE, NARROW)
    assert browser.execute_script("return window.pwned") is None
