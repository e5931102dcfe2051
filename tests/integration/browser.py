"""A headless Chromium, driven through its DevTools protocol: open a page, type, read it, take its picture."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-port=0", "--window-size=1400,900",
]  # fmt: skip
START_S = 60.0


class Page:
    """One tab. ``errors``: what its console said at level error, and exceptions that nobody caught."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self.errors = socket, 0, list[str]()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; events that come before its answer are noted."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(str(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState == 'complete'")

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until the expression holds; what the page shows where it does not. It may raise while a page loads."""
        deadline = time.monotonic() + seconds
        while not await self.value(f"(() => {{ try {{ return {expression} }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, f"never came true: {expression}\n{await self.text()}"
            await asyncio.sleep(0.2)

    async def text(self) -> str:
        return await self.value("document.body ? document.body.innerText : ''")

    async def type(self, text: str) -> None:
        """Into the field that has the focus."""
        await self.call("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """The middle of the element, as a mouse does."""
        place = f"(r => [r.x + r.width / 2, r.y + r.height / 2])({selector}.getBoundingClientRect())"
        x, y = await self.value(place)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Page]:
    """A browser with a fresh ``profile`` and one empty page; it ends with the block."""
    log = (profile.parent / f"{profile.name}.log").open("wb")
    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = await asyncio.to_thread(subprocess.Popen, command, stdout=log, stderr=log)
    try:
        port = await _port(profile, browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [target for target in await answer.json() if target["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        browser.terminate()
        browser.wait(timeout=20)
        log.close()


async def _port(profile: Path, browser: subprocess.Popen[bytes]) -> int:
    """Chromium writes the port that it took into its profile."""
    deadline = time.monotonic() + START_S
    while not (found := profile / "DevToolsActivePort").exists() or not found.read_text().strip():
        assert browser.poll() is None and time.monotonic() < deadline, f"chromium did not start: {profile}.log"
        await asyncio.sleep(0.1)
    return int(found.read_text().split()[0])
