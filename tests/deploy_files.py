"""What the tests of deploy/ share: where it is, tools that read it, the command line that it uses.

A helper of the tests, not a test.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from onecast.runtime import cli
from onecast.runtime.nodes import Nodes
from onecast.runtime.serve_config import ServeConfig

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
_UNPACKED = ROOT / "build" / "tools" / "usr" / "libexec" / "docker" / "cli-plugins"


def compose() -> list[str]:
    """The command `docker compose`, version 2; skips the test where there is none."""
    for command in (["docker", "compose"], ["docker-compose"], [str(_UNPACKED / "docker-compose")]):
        if shutil.which(command[0]) is None:
            continue
        told = subprocess.run(
            [*command, "version", "--short"], capture_output=True, text=True, timeout=30
        )
        if told.returncode == 0 and told.stdout.strip().lstrip("v").startswith("2"):
            return command
    pytest.skip("docker compose 2 is not here (Debian 13: package docker-compose)")


def kustomize(folder: Path) -> str:
    """What `kubectl apply -k folder` would send; skips the test where kubectl is not there."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert built.returncode == 0, built.stderr
    return built.stdout


def expanded(arguments: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Arguments of a container as Kubernetes expands them; a variable must be there."""
    return [
        re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], argument)
        for argument in arguments
    ]


def understood(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[ServeConfig, Nodes]:
    """What `onecast` makes of a command line: it must get as far as to the start of ranks."""
    given: list[Any] = []
    monkeypatch.setattr(
        "onecast.runtime.launch.launch", lambda *settings: given.append(settings) or 0
    )
    assert cli.main(arguments) == 0
    ((config, nodes),) = given
    assert isinstance(config, ServeConfig)
    return config, nodes


def dockerfile(instruction: str) -> list[str]:
    """What follows each `instruction` of the Dockerfile, continued lines joined."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{instruction}\s+(.*)$", text, re.MULTILINE)
