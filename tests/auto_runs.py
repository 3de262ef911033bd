"""Runs the scripts in auto_programs/ as a user would. A helper of the tests, not a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

PROGRAMS = Path(__file__).parent / "auto_programs"
BIN = Path(sys.executable).parent
ONECAST_RUN = (str(BIN / "onecast"), "telemetry", "run")
OPENTELEMETRY = (str(BIN / "opentelemetry-instrument"),)


class Program:
    """One run of a script by torchrun, with what it says kept in files."""

    def __init__(
        self, home: Path, command: tuple[str, ...], script: str | Path, *arguments: object,
        options: tuple[str, ...] = (), launcher: tuple[str, ...] | None = None,
        num_ranks: int = 2, meet: bool = True, **variables: str,
    ) -> None:  # fmt: skip
        """With `meet` the script stays at its end until `release`. Default launcher: torchrun."""
        home.mkdir(exist_ok=True)
        self._home = home
        self._num_ranks = num_ranks
        if launcher is None:
            launcher = str(BIN / "torchrun"), "--nproc-per-node", str(num_ranks)
        separator = ("--",) if command is ONECAST_RUN else ()
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "", **variables}
        if meet:
            environ["MEETING"] = str(home)
        with (home / "out").open("w") as out, (home / "err").open("w") as err:
            self.process = subprocess.Popen(
                [*command, *options, *separator, *launcher, PROGRAMS / script,
                 *map(str, arguments)],
                stdout=out, stderr=err, env=environ, cwd=home,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return (self._home / "out").read_text()

    @property
    def err(self) -> str:
        return (self._home / "err").read_text()

    @property
    def metrics_url(self) -> str:
        """As the one line on stderr says it."""
        (url,) = re.findall(r"^onecast telemetry: metrics of .* at (http://\S+)$", self.err, re.M)
        return str(url)

    def meet(self) -> None:
        """Wait until all ranks have done their work."""

        def met() -> bool:
            assert self.process.poll() is None, self.out + self.err
            return all((self._home / f"done-{rank}").exists() for rank in range(self._num_ranks))

        wait_until(met, "the ranks to meet")

    def release(self) -> None:
        (self._home / "go").touch()

    def finish(self, timeout_s: float = 90.0) -> int:
        """Let it go on and end; its exit status."""
        self.release()
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """If the test has failed: torchrun ends its ranks, and each sidecar ends after them."""
        if self.process.poll() is None:
            self.release()
            self.process.terminate()
            self.process.wait(30)

    def counts(self, *labels: str, metric: str = "collective_duration_seconds_count") -> Counts:
        """The metric's value now, by the values of these labels, added up over all others."""
        found: dict[tuple[str, ...], float] = defaultdict(float)
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"onecast_{metric}":
                    found[tuple(sample.labels.get(label, "") for label in labels)] += sample.value
        return dict(found)

    def await_counts(self, wanted: Counts) -> None:
        """Wait until the ranks have just so many collectives of each operation."""
        deadline = time.monotonic() + 10
        while (found := self.counts("op", "rank")) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == wanted, f"{found} is not {wanted}"


Counts = dict[tuple[str, ...], float]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
