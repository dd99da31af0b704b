"""A real browser for tests: Debian's Chromium, driven by its own chromedriver. It keeps to the loopback interface."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")
#: Long enough for a machine that does much else; nothing waits this long when all is well.
PATIENCE_S = 90.0
_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


class BrowserWindow:
    """One browser with one tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get(address)

    def wait(self, what: Callable[[], T], why: str) -> T:
        """Wait until something is true of the page, and return it. What is replaced meanwhile is looked up again."""
        ends_at = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(StaleElementReferenceException, NoSuchElementException):
                if found := what():
                    return found
            assert time.monotonic() < ends_at, f"{why}; the page says:\n{self.text}"
            time.sleep(0.05)

    def find(self, css: str, text: str = "") -> WebElement:
        """Wait for the element that is visible and has that text in it."""

        def look() -> WebElement | None:
            found = self.driver.find_elements(By.CSS_SELECTOR, css)
            return next((one for one in found if one.is_displayed() and text in one.text), None)

        found = self.wait(look, f"there is no {css} with {text!r}")
        assert found is not None
        return found

    def wait_for_text(self, text: str) -> None:
        self.wait(lambda: text in self.text, f"{text!r} does not appear")

    def wait_until_gone(self, css: str, text: str = "") -> None:
        def look() -> bool:
            found = self.driver.find_elements(By.CSS_SELECTOR, css)
            return not any(one.is_displayed() and text in one.text for one in found)

        self.wait(look, f"{css} with {text!r} stays")

    def click(self, css: str, text: str = "") -> None:
        """Click it once it is there and nothing lies over it (dialogs fade)."""

        def press() -> bool:
            element = self.find(css, text)
            is_on_top = (
                "const r = arguments[0].getBoundingClientRect();"
                "const e = document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2);"
                "return !!e && (arguments[0].contains(e) || e.contains(arguments[0]))"
            )
            if not element.is_enabled() or not self.driver.execute_script(is_on_top, element):
                return False
            element.click()
            return True

        self.wait(press, f"{css} with {text!r} cannot be clicked")

    def type(self, css: str, text: str) -> None:
        """Type into a field once it takes input."""
        self.wait(lambda: self.find(css).is_enabled(), f"{css} stays disabled")
        self.find(css).send_keys(text)

    @property
    def text(self) -> str:
        """What a person can read."""
        return str(self.driver.execute_script("return document.body ? document.body.innerText : ''"))

    def run(self, script: str) -> Any:
        """Run JavaScript in the page; the value that it returns."""
        return self.driver.execute_script(script)

    def requests(self) -> list[str]:
        """What was asked of the network since the last call, sockets included, whether or not it was let through."""
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                asked.append(message["params"]["url"])
        return [address for address in asked if address.startswith(("http:", "https:", "ws:", "wss:"))]

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: script errors, what its policy refused, failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[BrowserWindow]:
    """A browser with a fresh profile in a folder; it ends with the block."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "Debian's chromium is missing: `make setup` installs it"
    assert driver, "Debian's chromium-driver is missing: `make setup` installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (*_SWITCHES, f"--user-data-dir={folder / 'profile'}", f"--disk-cache-dir={folder / 'cache'}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    environ = {"HOME": str(folder), "TMPDIR": str(folder), "PATH": "/usr/bin:/bin", "NO_PROXY": "*"}
    window = webdriver.Chrome(options=options, service=Service(executable_path=driver, env=environ))
    try:
        window.set_page_load_timeout(PATIENCE_S)
        yield BrowserWindow(window)
    finally:
        window.quit()
