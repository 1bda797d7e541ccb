"""The live page in a real browser, in front of the built-in model whose KV does not fit.

`PIE_ASYNC_SHOTS=DIR` keeps screenshots of both sizes, light and dark, to be looked at.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop
from aiohttp import web

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.api import create_app
from tests.support import browsers

CONFIG = EngineConfig(device_kv_bytes=2**20, host_pool_bytes=32 * 2**20, cpu_threads=1)
KEY = "the-key"
EVIL = "<img src=x onerror=document.title='broken'>"
EXPECTED = (
    "Failed to load resource: the server responded with a status of 401",  # before it has the key
    "Canvas2D: Multiple readback operations",  # of this test
)
MOST_LOOKS = 1200
"""Twenty a second: a minute, for Chromium may be one of many on two processors."""
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}


class Server:
    """An engine under load behind its HTTP server, on a loop in a thread."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.ready = threading.Event()
        self.over = asyncio.Event()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._serve()))
        self.url = ""
        self.looks = 0

    async def _serve(self) -> None:
        async with Engine(CONFIG) as engine:
            self.engine = engine
            runner = web.AppRunner(create_app(engine, api_keys=[KEY]), handler_cancellation=True)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            load = [asyncio.create_task(self._load(number)) for number in range(4)]
            self.ready.set()
            await self.over.wait()
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)
            await runner.cleanup()

    async def _load(self, number: int) -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True, output_kind="final")
        while True:
            name = EVIL if number == 0 else None
            async for _ in self.engine.generate("ROMEO:\n" * 20, params, request_id=name):
                pass


@pytest.fixture(scope="module")
def server(browser) -> Iterator[Server]:
    running = Server()
    running.thread.start()
    assert running.ready.wait(60)
    yield running
    running.loop.call_soon_threadsafe(running.over.set)
    running.thread.join(60)
    assert not running.thread.is_alive()
    running.loop.close()


@pytest.fixture
def open_page(browser, server):
    """Call it for a page that has been given the key; its complaints fail the test."""
    contexts, complaints = [], []

    def run(size: str = "desktop", scheme: str = "light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: None if said.text.startswith(EXPECTED) else complaints.append(said.text),
        )
        page.on("request", lambda sent: sent.url.startswith((server.url, "data:"))
                or complaints.append(f"asks elsewhere: {sent.url}"))  # fmt: skip
        page.goto(server.url)
        page.get_by_label("This server asks for an API key").fill(KEY)
        page.keyboard.press("Enter")
        until(page, "document.getElementById('status').textContent === 'live'")
        return page

    yield run
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, expression: str) -> None:
    """Wait for it. Playwright's own way evaluates in the page, whose policy forbids that."""
    look_until(page, lambda: page.evaluate(expression), f"never true: {expression}")


def look_until(page, is_so: Callable[[], bool], complaint: str) -> None:
    for _ in range(MOST_LOOKS):
        if is_so():
            return
        page.wait_for_timeout(50)
    pytest.fail(complaint)


def pixels(page, canvas: str, colour: str) -> int:
    """How many pixels of a canvas have the colour of a CSS variable."""
    return page.evaluate(
        """([id, name]) => {
          const canvas = document.getElementById(id), probe = document.createElement("canvas");
          const pen = probe.getContext("2d");
          pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
          pen.fillRect(0, 0, 1, 1);
          const [r, g, b] = pen.getImageData(0, 0, 1, 1).data;
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let found = 0;
          for (let at = 0; at < data.length; at += 4)
            found += data[at] === r && data[at + 1] === g && data[at + 2] === b;
          return found;
        }""",
        [canvas, colour],
    )


def until_painted(page, canvas: str, colour: str) -> None:
    """Wait until a canvas shows a colour: what is streamed, say, changes from moment to moment."""
    look_until(page, lambda: pixels(page, canvas, colour) > 20, f"{canvas} never shows {colour}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_shows_what_the_engine_does(open_page, size: str, scheme: str) -> None:
    page = open_page(size, scheme)
    until(page, "Number(document.getElementById('tile-output').textContent) > 0")
    until(page, "parseFloat(document.getElementById('tile-expansion').textContent) > 1")
    until(page, "document.querySelectorAll('#req-rows tr').length === 4")
    until(page, "/measured/.test(document.getElementById('h2d-text').textContent)")
    assert page.locator("#gov-list li").count() >= 1
    for canvas, colour in (("map-arena", "--resident"), ("map-pool", "--streamed"),
                           ("time", "--compute"), ("time", "--h2d")):  # fmt: skip
        until_painted(page, canvas, colour)
    until(page, "document.title.endsWith('tok/s · pie_async')")
    names = page.locator("#req-rows td:first-child").all_text_contents()
    assert EVIL in names and page.locator("#req-rows img").count() == 0
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    if (folder := os.environ.get("PIE_ASYNC_SHOTS")) is not None:
        page.screenshot(path=Path(folder) / f"{size}-{scheme}.png", full_page=True)


def test_the_model_answers_stops_and_starts_anew(open_page) -> None:
    page = open_page()
    page.locator("#chat-text").fill("Who goes there?")
    page.keyboard.press("Enter")
    answer = page.locator("#chat-log .assistant")
    until(page, "document.querySelector('#chat-log .note')")
    assert "tokens/s" in page.locator("#chat-log .note").text_content()
    assert len(answer.text_content()) > 20
    page.locator("#chat-max").fill("3000")
    page.locator("#chat-text").fill("And what then?")
    page.get_by_role("button", name="Send").click()
    until(page, "document.querySelectorAll('.assistant')[1]?.textContent.length > 5")
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('#chat-log .note')[1]?.textContent === 'stopped'")
    assert page.get_by_role("button", name="Send").is_visible()
    page.get_by_role("button", name="Start anew").click()
    assert page.locator("#chat-log p").count() == 0


def test_everything_can_be_reached_by_keyboard(open_page) -> None:
    page = open_page()
    page.evaluate("""() => {
      window.reached = [];
      document.addEventListener("focusin", ({ target: { id, className } }) =>
        reached.push(id || className));
    }""")
    for _ in range(36):
        page.keyboard.press("Tab")
    reached = page.evaluate("reached")
    wanted = [
        "skip",
        "pause",
        "scroll",
        "chat-log",
        "chat-text",
        "chat-max",
        "chat-heat",
        "chat-new",
    ]
    in_order = [each for each in reached if each in wanted]
    assert in_order[(first := in_order.index("skip")) : first + len(wanted)] == wanted
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.locator("#pause").focus()
    page.keyboard.press("Space")
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    assert page.evaluate(outline) == "solid"


def test_a_paused_page_and_a_closed_one_cost_the_server_nothing(open_page, server) -> None:
    page = open_page()
    real, looks = server.engine.look, []

    async def counted(**options: float):
        looks.append(options)
        return await real(**options)

    server.engine.look = counted
    try:
        page.wait_for_timeout(1200)
        assert len(looks) >= 2
        page.locator("#pause").click()
        page.wait_for_timeout(600)
        looks.clear()
        page.wait_for_timeout(1500)
        assert looks == []
        page.locator("#pause").click()
        until(page, "document.getElementById('status').textContent === 'live'")
    finally:
        server.engine.look = real


def test_a_wrong_key_is_told_and_another_one_may_be_tried(browser, server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.goto(server.url)
    for key, status in (("wrong", "that key is not known here"), (KEY, "live")):
        page.locator("#key-text").fill(key)
        page.get_by_role("button", name="Watch").click()
        until(page, f"document.getElementById('status').textContent === '{status}'")
    assert not page.locator("#key").is_visible()
    assert KEY not in page.evaluate(
        "JSON.stringify([localStorage, sessionStorage, document.cookie])"
    )
    context.close()


@pytest.mark.usefixtures("browser")  # where there is none this is skipped
@pytest.mark.parametrize("most_s", [0.5, 3.0])
def test_a_browser_that_does_not_answer_is_given_up(most_s: float) -> None:
    def ask_in_vain() -> None:
        with browsers.running(most_s=most_s) as browser:
            browser.new_page().evaluate("new Promise(() => {})")

    with ThreadPoolExecutor(1) as thread:  # the fixture's playwright has this one
        asked = thread.submit(ask_in_vain)
        with pytest.raises(pytest.fail.Exception, match="was not done after"):
            asked.result(60)
