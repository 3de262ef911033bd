"""Pictures of small pages, painted by Chromium.

Owns how Chromium is found and asked; the program alone, no library to drive it. Knows nothing of
what is on a page.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WIDTH, _SCALE = 584, 2  # CSS pixels; pixels of the picture for each
_TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def paint(pages: Mapping[str, tuple[str, int]], folder: Path) -> list[Path]:
    """Write NAME.png of each page, so many CSS pixels high; none where there is no Chromium.

    Raises subprocess.CalledProcessError where Chromium fails, with what it said.
    """
    chromium = find_chromium()
    if chromium is None:
        return []
    made = []
    with tempfile.TemporaryDirectory(prefix="onecast-pictures-") as scratch:
        for name, (page, height) in pages.items():
            source = Path(scratch, f"{name}.html")
            source.write_text(page, encoding="utf-8")
            target = folder / f"{name}.png"
            _paint(chromium, source, target.resolve(), Path(scratch, "profile"), height)
            made.append(target)
    return made


def _paint(chromium: str, source: Path, target: Path, profile: Path, height: int) -> None:
    command = [
        chromium, "--headless", "--disable-gpu", "--hide-scrollbars", f"--screenshot={target}",
        f"--window-size={_WIDTH},{height}", f"--force-device-scale-factor={_SCALE}",
        f"--user-data-dir={profile}", "--no-first-run", source.as_uri(),
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium refuses to be root in its sandbox
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
