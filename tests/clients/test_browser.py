"""The page at / in a headless Chromium: it shows what the engine does, in light and dark, and asks for a key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
]
BODY = {"prompt": "def area(w, h):\n    return w * h\n" * 4, "max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as player:
        found = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=512)
    with live(llm, served_model_name=["tiny"]) as found:
        yield found


def opened(browser: Any, server: Live, scheme: str, faults: list[str]) -> Any:
    """The page, with every error of its script and every request that goes elsewhere noted."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 760})
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or faults.append(request.url))
    page.goto(server.url + "/")
    return page


def wait_for(page: Any, condition: str) -> None:
    """Playwright's own wait evaluates strings on the page, which the page's policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never came true: {condition}")


def inked(page: Any, canvas: str) -> int:
    """Pixels that were drawn on."""
    script = """id => { const canvas = document.getElementById(id), pen = canvas.getContext("2d");
        return pen.getImageData(0, 0, canvas.width, canvas.height).data.filter((v, i) => i % 4 == 3 && v).length }"""
    return int(page.evaluate(script, canvas))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_the_engine(browser: Any, server: Live, scheme: str, tmp_path: Path) -> None:
    faults: list[str] = []
    page = opened(browser, server, scheme, faults)
    wait_for(page, "document.getElementById('status').textContent == 'live'")
    for _ in range(3):
        assert server.post("/v1/completions", BODY).status == 200
    wait_for(page, "rates.length > 1 && rates.some(rate => rate > 0)")  # one point is no line yet
    assert page.inner_text("#tokens").replace(",", "").isdigit()
    wait_for(page, "/ steps of /.test(document.getElementById('strip-text').textContent)")
    assert page.inner_text("#model") == "tiny on cpu"
    wait_for(page, "document.getElementById('running').textContent == '0'")
    assert page.inner_text("#hits").endswith(" %")
    assert " free of " in page.inner_text("#kv-text")
    assert inked(page, "strip") > 1000
    assert inked(page, "rate") > 10
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / f"{scheme}.png")
    page.close()
    assert not faults


def test_the_page_asks_for_a_key(browser: Any) -> None:
    with live(FakeEngine(), api_key=["secret"]) as server:
        faults: list[str] = []
        page = opened(browser, server, "light", faults)
        page.wait_for_selector("#key", state="visible")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#key", state="hidden")
        wait_for(page, "document.getElementById('status').textContent == 'live'")
        assert page.inner_text("#model") == "fake on cpu"
        page.close()
        assert not faults
