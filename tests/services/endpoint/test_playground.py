"""The playground in a real browser."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from endpoints import AGENT, LLM, LengthScorer, make_backend, running_endpoint
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from small_agents import random_agent

from mara_rl.common.errors import RetryableError
from mara_rl.llm.policy_llm import load_policy_llm
from services.endpoint.openai_api import PAGE

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
KEY = "a-key-for-the-tests"
PROMPT = "How do I bake bread?"

pytestmark = pytest.mark.slow


class Page:
    """A page in a browser, by the ids of what is on it."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def open(self, url: str, width: int = 1320, *, dark: bool = False) -> None:
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [look]})
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(url)

    def find(self, selector: str):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"{what}; page:\n{self.text('body')}"
            time.sleep(0.05)

    def ask(self, prompt: str = PROMPT) -> None:
        self.until(lambda: self.find("#agent").is_enabled(), "the page does not connect")
        self.find("#prompt").clear()
        self.find("#prompt").send_keys(prompt)
        self.find("#send").click()

    def until_answered(self) -> None:
        self.until(lambda: self.text("#send") == "Answer", "the answers do not end")

    def errors(self) -> list[str]:
        """What the browser complains of, requests that were refused aside."""
        return [
            entry["message"]
            for entry in self.browser.get_log("browser")
            if "Failed to load resource" not in entry["message"]
        ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    if not (CHROMIUM and DRIVER):
        reason = "needs chromium and chromium-driver (apt-get install chromium chromium-driver)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser) -> Page:
    browser.get_log("browser")  # forgets what was there before
    return Page(browser)


@pytest.fixture(scope="module")
def llm(tiny_llms):
    return load_policy_llm(str(tiny_llms["llama"]), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(llm) -> Iterator[str]:
    agents = {
        AGENT: random_agent(llm, "relative", top_k=6),
        "published": random_agent(llm, "paper", top_k=6, rule="threshold"),
    }
    backend = make_backend(llm, agents=agents, scorer=LengthScorer(), step_s=0.01)
    with running_endpoint(backend) as (url, _):
        yield url


def test_the_page_loads_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    for outside in ("http:", "https:", "@import", "<script src", '<link rel="stylesheet'):
        assert outside not in text.replace("http://www.w3.org/2000/svg", "")


def test_both_answers_stream_side_by_side_with_scores(page, url):
    page.open(url)
    page.browser.execute_script(
        "window.labels = []; const button = document.querySelector('#send');"
        "new MutationObserver(() => labels.push(button.textContent.trim()))"
        ".observe(button, {childList: true, characterData: true, subtree: true});"
    )
    page.ask()
    page.until(lambda: page.all("#aligned .t"), "no aligned token comes")
    page.until_answered()
    # However busy the machine is: what the button has said, not what it says by now.
    assert "Stop" in page.browser.execute_script("return window.labels")
    assert page.text("#llm") == LLM
    assert page.text("#base small") == LLM
    assert page.text("#aligned small") == "mara-tiny/1"
    said = {"role": "user", "content": PROMPT}
    answer = httpx2.post(
        f"{url}/v1/chat/completions", json={"model": AGENT, "messages": [said], "max_tokens": 64}
    ).json()
    # The aligned tokens carry a mark at the end where the LLM ended its answer by itself.
    shown = page.find("#aligned .text").get_attribute("textContent")
    whole = answer["choices"][0]["message"]["content"]
    if answer["choices"][0]["finish_reason"] == "stop":
        whole += "end"
    assert "".join(shown.split()) == "".join(whole.split())
    assert page.all("#aligned .text .t.moved")
    for side in ("#base", "#aligned"):
        facts = page.text(f"{side} .facts")
        assert "reward" in facts
        assert "cost, lower is better" in facts
    asked = {"model": AGENT, "messages": [said], "max_tokens": 64, "mara": {}}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=asked).json()
    each = answer["choices"][0]["mara"]["examined"] / answer["usage"]["completion_tokens"]
    assert f"candidates a token\n{each:.2f}" in page.text("#aligned .facts")
    assert page.find("#progress").get_attribute("textContent") == "Both answers are complete."
    assert any(word in page.text("#aligned .facts") for word in ("better", "worse", "same"))
    assert page.errors() == []


def test_candidates_by_hover_click_and_keyboard(page, url):
    page.open(url)
    page.ask()
    page.until_answered()
    moved = page.find("#aligned .text .t.moved")
    ActionChains(page.browser).move_to_element(moved).perform()
    page.until(lambda: "instead of" in page.text("#why-body"), "hovering explains nothing")
    assert "%" in page.text("#why-body tr.taken")
    assert len(page.all("#why-body tbody tr")) > 1
    tokens = page.all("#aligned .text .t")
    tokens[0].click()
    assert tokens[0].get_attribute("aria-pressed") == "true"
    first = page.text("#why-body")
    tokens[0].send_keys(Keys.ARROW_RIGHT)
    assert tokens[1].get_attribute("aria-pressed") == "true"
    assert page.browser.switch_to.active_element == tokens[1]
    assert page.text("#why-body") != first
    tokens[1].send_keys(Keys.END)
    assert tokens[-1].get_attribute("aria-pressed") == "true"
    tokens[-1].send_keys(Keys.ESCAPE)
    assert tokens[-1].get_attribute("aria-pressed") is None
    # One stop for Tab, however many tokens there are.
    assert len([token for token in tokens if token.get_attribute("tabindex") == "0"]) == 1
    assert page.errors() == []


def test_strength_zero_says_what_the_llm_says_of_its_candidates(page, url):
    page.open(url)
    page.until(lambda: page.find("#agent").is_enabled(), "the page does not connect")
    page.find("#strength").send_keys(Keys.HOME)
    assert page.text("#strength-value") == "0.0"
    page.ask()
    page.until_answered()
    assert page.all("#aligned .text .t.moved") == []
    assert '"strength": 0' in page.find("#call").get_attribute("textContent")
    page.find("#agent").send_keys("published")
    page.ask()
    page.until_answered()  # an agent of this kind has no strength but 1: the server says so
    assert "acts alone at strength 1" in page.text("#aligned .problem")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1320, 390])
def test_it_is_readable_on_every_screen(page, url, width, dark):
    page.open(url, width, dark=dark)
    page.ask()
    page.until_answered()
    run = page.browser.execute_script
    assert run("return document.documentElement.scrollWidth <= innerWidth")
    background = run("return getComputedStyle(document.body).backgroundColor")
    assert (int(background.removeprefix("rgb(").split(",")[0]) < 60) is dark
    run("arguments[0].scrollIntoView({block: 'center'})", page.all("#aligned .text .t")[5])
    page.all("#aligned .text .t")[5].click()
    why = page.find("#why")
    page.until(why.is_displayed, "no explanation is to be seen")
    if width < 600:
        assert why.value_of_css_property("position") == "fixed"
        visible = "const t = arguments[0].getBoundingClientRect(), w = arguments[1]"
        visible += ".getBoundingClientRect(); return t.top >= 0 && t.bottom <= w.top"
        token = page.find("#aligned .t.on")
        page.until(lambda: run(visible, token, why), "the token hides behind the explanation")
        page.find("#close").click()
        assert not why.is_displayed()
    assert page.errors() == []


def test_stop_ends_both_answers(page, llm):
    backend = make_backend(llm, step_s=0.1)
    with running_endpoint(backend) as (url, endpoint):
        page.open(url)
        page.ask()
        page.until(lambda: page.all("#aligned .t"), "no aligned token comes")
        page.find("#send").click()
        page.until_answered()
        page.until(lambda: not endpoint.backend().loop.in_use, "slots are not given back")
    assert backend.loop.finished["cancelled"] == 2


def test_while_the_llm_loads_the_page_waits(page, llm):
    go_on = threading.Event()

    def slow():
        go_on.wait()
        return make_backend(llm)

    with running_endpoint(slow) as (url, _):
        page.open(url)
        page.until(lambda: "loading" in page.text("#llm"), "loading is not shown")
        assert "The LLM is loading" in page.text("#notice")
        assert not page.find("#send").is_enabled()
        go_on.set()
        page.until(lambda: page.text("#llm") == LLM, "the page does not go on")
        assert not page.find("#notice").is_displayed()


def test_a_key_is_asked_for(page, llm):
    with running_endpoint(make_backend(llm), keys=[KEY]) as (url, _):
        page.open(url)
        page.until(lambda: page.find("#key").is_displayed(), "no key is asked for")
        page.find("#key-input").send_keys("a-wrong-key", Keys.ENTER)
        page.until(lambda: "not known" in page.text("#notice"), "a wrong key is not named")
        page.find("#key-input").clear()
        page.find("#key-input").send_keys(KEY, Keys.ENTER)
        page.until(lambda: page.find("#agent").is_enabled(), "the key does not open the page")
        page.ask()
        page.until_answered()
        assert page.all("#aligned .t")
        assert not page.find("#key").is_displayed()
        call = page.find("#call").get_attribute("textContent")
        assert '-H "Authorization: Bearer $MARA_API_KEY"' in call
        assert KEY not in call


def test_without_agents_or_a_server_it_says_so(page, llm):
    with running_endpoint(make_backend(llm, agents={})) as (url, _):
        page.open(url)
        page.until(lambda: page.text("#llm") == LLM, "the page does not connect")
        assert "There is no agent for this LLM yet" in page.text("#aligned .text")
        page.find("#prompt").send_keys(PROMPT)
        page.find("#send").click()
        page.until_answered()
        assert page.text("#base .text")
        assert page.find("#progress").get_attribute("textContent") == "The answer is complete."
    page.find("#send").click()
    page.until(lambda: page.all("#base .problem"), "an error is not shown")
    assert "does not answer" in page.text("#base .problem")
    page.until(lambda: page.text("#llm") == "not available", "the page thinks the server is there")
    assert page.find("#progress").get_attribute("textContent") == ""


def test_scores_that_did_not_come_are_said_to_be_once(page, llm):
    class Away(LengthScorer):
        away = True

        def score(self, pairs):
            if self.away:
                raise RetryableError("score 'reward' is away")
            return super().score(pairs)

    scorer = Away()
    with running_endpoint(make_backend(llm, scorer=scorer)) as (url, _):
        page.open(url)
        page.ask()
        page.until_answered()
        assert page.text("#notice") == "Scores: score 'reward' is away"
        assert "–" in page.text("#aligned .facts")
        scorer.away = False
        page.ask()
        page.until_answered()
        assert not page.find("#notice").is_displayed()
