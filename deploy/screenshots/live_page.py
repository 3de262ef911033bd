"""Takes the picture of the live page that the README shows: the demo on ranks of this machine.

    .venv/bin/python deploy/screenshots/live_page.py [--out FILE] [--tp N] [--width PIXELS]

Needs Chromium and playwright. The demo runs as a user would run it; the page is looked at while it
goes on, with one collective chosen.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

_HERE = Path(__file__).parent
_WARM_UP_S = 6.0  # of steps before the picture, so that there are numbers to show
_START_S = 60.0
_END_S = 180.0  # let it end by itself: it leaves nothing behind then


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the picture of the live page.")
    parser.add_argument("--out", type=Path, default=_HERE / "live.png")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    port = _free_port()
    with tempfile.TemporaryDirectory() as out:
        run = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c", "from onecast.runtime.cli import main; main()"),
                *("demo", "--tp", str(options.tp), "--channel", "process-group"),
                *("--metrics-port", str(port), "--output", f"{out}/o.jsonl", "--show", "0"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            cwd=out,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(f"{url}/healthz", run)
            _take(url, options.out, options.width, dark=options.dark)
            run.wait(_END_S)
        finally:
            run.terminate()
            run.wait(30)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(url: str, run: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, ConnectionError):
            if run.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"nothing serves {url}; the demo: {run.poll()}") from None
            time.sleep(0.1)


def _take(url: str, out: Path, width: int, *, dark: bool) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page.goto(url)
        page.wait_for_selector("#timeline[data-bars]", timeout=_START_S * 1000)
        page.wait_for_timeout(_WARM_UP_S * 1000)
        _choose_the_longest_wait(page)
        page.screenshot(path=out, full_page=True)
        browser.close()


def _choose_the_longest_wait(page: Page) -> None:
    page.focus("#timeline")
    page.evaluate("timeline.choose(worstOf(timeline.step))")


if __name__ == "__main__":
    main()
