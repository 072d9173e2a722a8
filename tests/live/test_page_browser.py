"""The page in a real browser. Needs chromium and its driver (apt-get install chromium chromium-driver)."""

import pytest
from chromium import NARROW, WIDE, assert_fits, find, find_all, press, resize, text, visit, wait
from live_runs import HOSTILE, MARKUP, F, serving
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.usefixtures("quiet_console")
TEXT = "def load(path):\n    return path"
HOSTILE_TEXT = "<img src=x onerror=window.pwned=1></script>\u202e{{ 7 * 7 }}"


@pytest.fixture
def page(browser, live):
    visit(browser, live.address)
    return browser


def fill(browser, selector, words):
    field = find(browser, selector)
    field.clear()
    field.send_keys(words)


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def open_view(browser, view):
    click(browser, f"a[data-view={view}]")
    wait(browser, f"!document.getElementById('{view}').hidden")


def often(known):
    """The feature that fires most often and, where it is clamped, changes the text."""
    return int(known.subject.statistics.density_F.argmax())


def written(browser):
    """Wait until both texts are whole."""
    wait(browser, "document.querySelectorAll('#texts section > .small').length === 2")
    return [text(browser, f"#text-{name} .passage") for name in ("own", "steered")]


# ---- look ----


def test_a_text_is_read_token_by_token(page):
    fill(page, "#look-text", TEXT)
    click(page, "#look-form button.main")
    wait(page, "!document.getElementById('found').hidden")
    assert text(page, "#text") == TEXT
    assert len(find_all(page, "#firing li")) > 8
    find_all(page, "#text .t")[3].click()
    wait(page, "document.querySelector('#effect h3') !== null")
    assert text(page, "#firing-title").startswith("Strongest on ")
    assert len(find_all(page, "#firing li")) == 8
    assert "What feature #" in text(page, "#effect")
    press(page, Keys.ESCAPE)
    assert text(page, "#firing-title") == "Strongest in the text"


def test_two_texts_are_compared(page):
    fill(page, "#look-text", "class A:\n    pass\nclass B(A):\n    pass")
    page.execute_script("document.querySelector('#look details').open = true")
    fill(page, "[name=against]", "import os\nimport sys\nfrom re import sub")
    click(page, "#look-form button.main")
    wait(page, "document.querySelectorAll('#contrast section').length === 2")
    shares = page.execute_script(
        "return [...document.querySelectorAll('#contrast .number')].map((one) => one.textContent[0])"
    )
    assert set(shares) == {"+", "\u2212"}


def test_every_feature_opens_from_the_list_and_leads_to_steering(page, known):
    feature = next(f for f in range(1, F, 4) if known.listed["maximum"][f] > 0)
    fill(page, "#search", f"#{feature}")
    wait(page, "document.querySelectorAll('.line').length === 1")
    click(page, ".line a")
    wait(page, "!document.getElementById('feature').hidden")
    assert "Not explained" in text(page)
    assert find_all(page, "#feature .example")
    order = page.execute_script("return [...document.querySelectorAll('#feature h2')].map((one) => one.textContent)")
    assert order.index("What it is connected to") < order.index("Where it fires")
    click(page, "#feature .steer button.main")
    wait(page, "!document.getElementById('steer').hidden")
    assert find(page, f"[name=f{feature}]").get_property("value") == "1"


# ---- steer ----


def test_sliders_steer_and_the_texts_stand_side_by_side(page, live, known):
    feature = often(known)
    visit(page, f"{live.address}/#view=steer&f{feature}=3")
    click(page, "#steer-form button.main")
    own, steered = written(page)
    assert own != steered
    assert find_all(page, "#texts .t[data-level]")
    command = text(page, "#command")
    assert (
        f"FEATURE_INDEX='{{{feature}: 3}}' METHOD=clamp POSITIONS=all PROMPT='def load(path):\n' NEW_TOKENS=12"
        in command
    )
    click(page, "#text-steered button")
    wait(page, "!document.getElementById('found').hidden")
    assert text(page, "#text") == "def load(path):\n" + steered


def test_a_text_without_visible_effect_says_so(page, live, known):
    visit(page, f"{live.address}/#view=steer&f{often(known)}=0.001")
    click(page, "#steer-form button.main")
    written(page)
    assert text(page, "#steer-status").startswith("No visible effect in this text")


def test_a_link_holds_the_whole_state(page, live, known):
    feature = often(known)
    visit(page, f"{live.address}/#view=steer&f{feature}=3")
    fill(page, "#prompt", "import re\n# it's a test")
    fill(page, "#seed", "7")
    click(page, "#steer-form button.main")
    texts, link = written(page), page.current_url
    visit(page, link)
    assert find(page, "#prompt").get_property("value") == "import re\n# it's a test"
    assert find(page, f"[name=f{feature}]").get_property("value") == "3"
    assert "PROMPT='import re\n# it'\\''s a test'" in text(page, "#command")
    click(page, "#steer-form button.main")
    assert written(page) == texts
    find(page, "#prompt").clear()
    find(page, "#prompt").send_keys("x", Keys.BACKSPACE)
    visit(page, page.current_url)
    assert find(page, "#prompt").get_property("value") == ""


def test_a_sweep_is_drawn_and_its_strengths_can_be_taken(page, live, known):
    feature = often(known)
    visit(page, f"{live.address}/#view=steer&f{feature}=-1")
    click(page, "#sweep")
    wait(page, "document.getElementById('steer-status').textContent.includes('a token')")
    assert len(find_all(page, "#swept tbody tr")) == 9
    assert len(find_all(page, "#swept polyline")) == 2
    click(page, "#swept tbody tr:nth-child(3) button")
    strength = float(text(page, "#swept tbody tr:nth-child(3) th"))
    assert float(find(page, f"[name=f{feature}]").get_property("value")) == pytest.approx(-strength, rel=0.01)


def test_strengths_of_a_sweep_over_two_features_keep_their_proportions_whichever_is_taken_before(page, live, known):
    features = known.subject.statistics.density_F.topk(2).indices.tolist()
    visit(page, f"{live.address}/#view=steer&f{features[0]}=1&f{features[1]}=2")
    click(page, "#sweep")
    wait(page, "document.getElementById('steer-status').textContent.includes('a token')")
    for row in (3, 6):
        click(page, f"#swept tbody tr:nth-child({row}) button")
        strength = float(text(page, f"#swept tbody tr:nth-child({row}) th"))
        found = [float(find(page, f"[name=f{feature}]").get_property("value")) for feature in features]
        assert found == pytest.approx([strength, 2 * strength], rel=0.02)


def test_a_conversation_is_steered_and_can_be_compared(page, live, known):
    visit(page, f"{live.address}/#view=chat&f{often(known)}=3")
    click(page, "#both")
    find(page, "#line").send_keys("import os", Keys.ENTER)
    wait(page, "document.querySelectorAll('#turns li').length === 3 && document.getElementById('halt').hidden")
    who = [element.text for element in find_all(page, "#turns .eyebrow")]
    assert who == ["You", "Without steering", "Steered"]
    own, steered = (element.text for element in find_all(page, "#turns li:nth-child(n + 2) .passage"))
    assert own != steered
    click(page, "#reset")
    assert not find_all(page, "#turns li")


def test_two_tabs_steer_with_their_own_features(page, live, known):
    feature, first = often(known), page.current_window_handle
    visit(page, f"{live.address}/#view=steer&f{feature}=3&tokens=40")
    click(page, "#steer-form button.main")
    page.switch_to.new_window("tab")
    try:
        visit(page, f"{live.address}/#view=steer&f{feature}=-3&tokens=40")
        click(page, "#steer-form button.main")
        second = written(page)
    finally:
        page.close()
        page.switch_to.window(first)
    assert written(page)[0] == second[0]
    assert written(page)[1] != second[1]


# ---- what goes wrong ----


def test_what_the_server_refuses_is_said_in_the_page(page, live):
    visit(page, f"{live.address}/#view=steer&tokens=4000")
    click(page, "#steer-form button.main")
    wait(page, "document.getElementById('steer-status').textContent.includes('see CHAT_CONTEXT')")
    page.get_log("browser")  # which tells of the refusal, too


def test_a_server_that_is_gone_is_said_and_one_that_is_back_goes_on(browser, known):
    with serving(known) as server:
        visit(browser, f"{server.address}/#view=look")
        fill(browser, "#look-text", TEXT)
    click(browser, "#look-form button.main")
    wait(browser, "document.getElementById('look-status').textContent.includes('does not answer')")
    with serving(known, port=server.port):
        click(browser, "#look-form button.main")
        wait(browser, "!document.getElementById('found').hidden")
        assert text(browser, "#text") == TEXT
    browser.get_log("browser")  # which tells of the refused connection


def test_hostile_text_is_shown_and_runs_nothing(page, live):
    fill(page, "#look-text", HOSTILE_TEXT)
    click(page, "#look-form button.main")
    wait(page, "!document.getElementById('found').hidden")
    assert text(page, "#text") == HOSTILE_TEXT.replace("\u202e", "")
    visit(page, f'{live.address}/#feature={HOSTILE}&f{HOSTILE}=1&prompt={HOSTILE_TEXT}&method=<b>&seed="><b>')
    assert MARKUP.replace("\u202e", "") in text(page)
    open_view(page, "steer")
    assert MARKUP.split("\u202e")[0] in text(page, "#edits")
    assert not find_all(page, "main img, main script")
    assert page.execute_script("return window.pwned") is None


# ---- sizes, keys, names ----


@pytest.mark.parametrize("view", ["look", "steer", "chat"])
def test_nothing_is_wider_than_the_screen(page, live, known, view):
    resize(page, NARROW)
    visit(page, f"{live.address}/#view={view}&f{often(known)}=1&text=x")
    page.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    assert_fits(page, NARROW, 768, WIDE)


def test_every_control_has_a_name_for_a_screen_reader(page, known, live):
    visit(page, f"{live.address}/#view=steer&f{often(known)}=1")
    for view in ("look", "steer", "chat"):
        open_view(page, view)
        page.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        controls = find_all(page, "main button, main input, main select, main textarea")
        assert all(control.accessible_name for control in controls if control.is_displayed())


def test_the_keyboard_alone_looks_and_returns(page):
    find(page, "#look-text").send_keys("import os", Keys.TAB, Keys.TAB, Keys.ENTER)
    wait(page, "!document.getElementById('found').hidden")
    press(page, "/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    press(page, Keys.ENTER, Keys.ENTER)
    wait(page, "!document.getElementById('feature').hidden")
    press(page, Keys.ESCAPE)
    wait(page, "document.getElementById('feature').hidden")
    assert page.find_element(By.ID, "look").is_displayed()
