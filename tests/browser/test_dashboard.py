"""What a person does at the dashboard: look, roll back by button, watch it change."""

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from domain.version import CHAMPION
from registry import aliases, assistants
from tests.browser.conftest import Stack
from tests.seeded_story import TEAM

pytestmark = pytest.mark.browser

SECONDS = 90


def text(browser: Chrome, selector: str) -> str:
    """Of the first match, read in one step: live regions are replaced under our feet."""
    found = browser.execute_script(
        "const it = document.querySelector(arguments[0]);"
        "return it ? it.innerText.replace(/\\s+/g, ' ') : '';",
        selector,
    )
    return str(found).strip()


def await_text(browser: Chrome, selector: str, wanted: str) -> None:
    WebDriverWait(browser, SECONDS, poll_frequency=0.1).until(
        lambda _: wanted in text(browser, selector), f"no '{wanted}' in {selector}"
    )


def press(browser: Chrome, selector: str) -> None:
    """Click the first match in one step: a live region may be replaced between finding it and a click."""
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def await_dialog(browser: Chrome, *, is_open: bool) -> None:
    WebDriverWait(browser, SECONDS).until(
        lambda _: browser.execute_script("return document.getElementById('dialog').open") is is_open
    )


def open_dialog(browser: Chrome) -> WebElement:
    press(browser, "#roll-back")
    await_dialog(browser, is_open=True)
    return browser.find_element(By.ID, "rollback-reason")


def champion_column(browser: Chrome) -> str:
    return text(browser, "#matrix thead th.champion")


def test_a_person_sees_what_serves_and_rolls_back(browser: Chrome, stack: Stack) -> None:
    name = stack.tell("support-bot").assistant
    browser.get(f"{stack.url}/dashboard")
    await_text(browser, f"tr:has(#assistant-{name})", "v2 serving")
    press(browser, f"#assistant-{name}")

    await_text(browser, "h1", name)
    await_text(browser, "#serving-version", "v2")
    assert champion_column(browser) == "champion v2"
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#matrix tbody tr')].map(r => [...r.cells].map("
        "c => c.classList.contains('blank') ? null : (c.querySelector('.score') || c).innerText))"
    )
    assert ["banking-intent", "0%", "85%", "80%", "37%"] in rows
    assert ["ticket-json", "2%", "5%", "82%", None] in rows
    assert "training" in text(browser, ".step.now")

    open_dialog(browser).send_keys(Keys.ESCAPE)
    await_dialog(browser, is_open=False)
    reason = open_dialog(browser)
    assert text(browser, "#rollback-from") == "v2"
    assert text(browser, "#rollback-to option:checked") == "v1"
    reason.send_keys("refunds went to the <wrong> desk", Keys.ENTER)

    await_text(browser, "#content", "champion moved from v2 to v1.")
    await_text(browser, "#serving-version", "v1")
    assert champion_column(browser) == "champion v1"
    newest = text(browser, "#history li")
    assert "champion v2 → v1 rolled back" in newest
    assert "by dashboard: refunds went to the <wrong> desk" in newest
    with stack.sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, name)
        move = aliases.history(session, assistant, CHAMPION, None, 1).rows[0]
    assert (move.kind, move.actor, move.revision) == ("rollback", "dashboard", 4)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_an_open_page_follows_what_others_do(browser: Chrome, stack: Stack) -> None:
    name = stack.tell("watched").assistant
    browser.get(f"{stack.url}/dashboard/assistants/{name}")
    await_text(browser, "#serving-version", "v2")
    browser.execute_script("window.sameDocument = true")

    moved = httpx.post(
        f"{stack.url}/v1/assistants/{name}/rollback",
        json={"to": "v0", "reason": "from a script"},
        timeout=SECONDS,
        trust_env=False,
    )

    assert moved.status_code == 200, moved.text
    await_text(browser, "#serving-version", "v0")
    assert champion_column(browser) == "champion v0"
    assert "by user: from a script" in text(browser, "#history li")
    assert browser.execute_script("return window.sameDocument") is True


def test_measured_items_are_shown_as_the_model_wrote_them(browser: Chrome, stack: Stack) -> None:
    name = stack.tell("measured").assistant
    browser.get(f"{stack.url}/dashboard/assistants/{name}")
    press(browser, "#matrix a[href*='versions/3?open=skill-banking-intent']")

    first = "#skill-banking-intent details.item"
    await_text(browser, f"{first} summary", "wrong <b>Where is my card?</b> (item 22)")
    browser.find_element(By.CSS_SELECTOR, f"{first} summary").click()
    assert text(browser, f"{first} .compare") == (
        "Prompt <b>Where is my card?</b> (item 22) Output Your card is on its way & arrives soon. "
        "Expected ROUTE: card_arrival"
    )
