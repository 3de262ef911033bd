"""`onecast top`: a run in the terminal, from its sidecar's `/live.json`.

Owns the command's options, the screen, when it asks again, and the exit status: 0, also when the
run ends; 1 where nothing answers or nothing runs; 2 where it is not clear what to watch.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, Self

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from .top import as_ascii, frame
from .top_source import LiveSource, NoAnswer, NotOurs, running_sidecars
from .top_window import Window

_INTERVAL_S = 1.0
_LEAST_INTERVAL_S = 0.25  # nothing is made anew more often: `http_server`
_MOST_INTERVAL_S = 3600.0
_GIVE_UP_S = 3.0  # a sidecar that died is started again at once, on the same port
_RETRY_S = 0.25
_LOOK_S = 0.1  # at the size of the terminal
_ONCE_S = 0.5  # between the two readings that give a rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onecast top`."""
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="http://HOST:PORT of a run, also with /metrics; without it, the run of this user on "
        "this host",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--interval", type=_interval, default=_INTERVAL_S, metavar="S",
        help=f"seconds between frames ({_INTERVAL_S:g}; at least {_LEAST_INTERVAL_S:g})",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Returns the exit status."""
    url = options.url
    if url is None:
        found = running_sidecars()
        if len(found) != 1:
            return _unclear([(path, record.pid, record.url) for path, record in found])
        url = found[0][1].url
    try:
        source = LiveSource(url)
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        if options.once:
            return _once(source)
        return _watch(source, options.interval)
    except KeyboardInterrupt:
        return 0  # how one leaves it
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _unclear(found: list[tuple[str, int, str | None]]) -> int:
    if not found:
        return _fail("no run of this user on this host serves metrics; give a URL", 1)
    _fail(f"{len(found)} runs are watched by a sidecar on this host; give the URL of one:", 2)
    for path, pid, url in found:
        print(f"  onecast top {url}   # {path}, sidecar {pid}", file=sys.stderr)
    return 2


def _fail(text: str, status: int) -> int:
    print(f"onecast top: {text}", file=sys.stderr)
    return status


def _once(source: LiveSource) -> int:
    window = Window()
    try:
        window.add(source.read())
    except (NoAnswer, NotOurs) as error:
        return _fail(str(error), 1)
    time.sleep(_ONCE_S)
    with suppress(NoAnswer, NotOurs):  # the run has just ended: what was read is its last
        window.add(source.read())
    _Frame(window, whole=True).print(Console(highlight=False))
    return 0


class _Frame:
    """The latest reading, drawn for whatever size the console has then."""

    def __init__(self, window: Window, *, whole: bool = False) -> None:
        self.window = window
        self.whole = whole  # numbers of the whole run, not of its last seconds
        self.note = ""
        self.size: tuple[int, int] | None = None  # columns and rows that it was drawn for

    def print(self, console: Console, *, apart: bool = False) -> None:
        """All of it, however high; `apart`: with an empty line after it."""
        for line in self._lines(console, console.width, None):
            console.print(line, no_wrap=True, overflow="crop")
        if apart:
            console.print()
        console.file.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        self.size = options.max_width, options.height or options.size.height
        yield from self._lines(console, *self.size)

    def _lines(self, console: Console, width: int, height: int | None) -> list[Text]:
        view, lately = self.window.view, self.window.lately(whole=self.whole)
        lines = frame(view, lately, width, height, self.note)
        if not console.options.ascii_only:
            return lines
        return [as_ascii(line, console.encoding) for line in lines]


def _watch(source: LiveSource, interval_s: float) -> int:
    """Frames until the sidecar is gone."""
    window = Window()
    try:
        window.add(source.read())
    except (NoAnswer, NotOurs) as error:
        return _fail(str(error), 1)
    console = Console(highlight=False)
    shown = _Frame(window)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        shown.print(console, apart=True)
        gone = _follow(source, shown, interval_s, lambda: shown.print(console, apart=True))
        print(gone, flush=True)
        return 0
    live = Live(shown, console=console, screen=True, auto_refresh=False)
    with _Interrupts() as interrupts:

        def draw() -> None:
            with interrupts.held():
                live.refresh()

        try:
            with interrupts.held():
                live.start(refresh=True)
            gone = _follow(source, shown, interval_s, draw, lambda: console.size)
        finally:
            with interrupts.held():
                live.stop()
                shown.note = ""
                shown.print(console)  # on the screen as it was before: the last frame stays
    console.print(Text(gone))
    return 0


def _follow(
    source: LiveSource,
    shown: _Frame,
    interval_s: float,
    draw: Callable[[], None],
    size: Callable[[], tuple[int, int] | None] = lambda: None,
) -> str:
    """Read and draw until nobody has answered for a while; says who does not."""
    silent: float | None = None  # since when it does not answer
    pause_s = interval_s
    while True:
        _wait(pause_s, draw, lambda: size() != shown.size)
        try:
            shown.window.add(source.read())
        except (NoAnswer, NotOurs) as error:
            silent = time.monotonic() if silent is None else silent
            if time.monotonic() - silent > _GIVE_UP_S:
                return f"The sidecar is gone: its run may have ended ({error})."
            if not shown.note:
                shown.note = "the sidecar does not answer"
                draw()
            pause_s = _RETRY_S
        else:
            silent, pause_s, shown.note = None, interval_s, ""
            draw()


def _wait(pause_s: float, draw: Callable[[], None], outdated: Callable[[], bool]) -> None:
    """Draw again at once where the size has changed."""
    until = time.monotonic() + pause_s
    while (left_s := until - time.monotonic()) > 0:
        if outdated():
            draw()
        time.sleep(min(left_s, _LOOK_S))


class _Interrupts:
    """SIGINT and SIGTERM end the loop, but not amid what must be whole: the terminal is to be left
    as it was found."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._held = False
        self._pending: int | None = None

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._arrived) for number in self._SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What comes meanwhile is heeded at the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending is not None:
            self._end(self._pending)

    def _arrived(self, number: int, _: object) -> None:
        if self._held:
            self._pending = number
        else:
            self._end(number)

    def _end(self, number: int) -> NoReturn:
        self._pending = None
        if number == signal.SIGTERM:
            sys.exit(128 + number)
        raise KeyboardInterrupt


def _interval(text: str) -> float:
    value = float(text)
    if not _LEAST_INTERVAL_S <= value <= _MOST_INTERVAL_S:
        raise argparse.ArgumentTypeError(
            f"{text} is not between {_LEAST_INTERVAL_S:g} and {_MOST_INTERVAL_S:g}"
        )
    return value
