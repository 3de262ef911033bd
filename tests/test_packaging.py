"""The wheel is what users get: it holds every package and runs two ranks outside the checkout."""

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_an_init_is_a_listed_package() -> None:
    folders = {
        "onecast." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("comm", "telemetry", "runtime")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("name", ["onecast.comm", "onecast.telemetry", "onecast.runtime"])
def test_the_table_of_contents_names_what_exists(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__, "empty table of contents"
    assert sorted(set(package.__all__)) == sorted(package.__all__)
    for entry in package.__all__:
        assert getattr(package, entry) is not None


@pytest.mark.parametrize("name", ["onecast.comm", "onecast.telemetry"])
def test_lower_packages_do_not_import_the_runtime(name: str) -> None:
    code = f"import sys, {name}; print([m for m in sys.modules if m.startswith('onecast.runtime')])"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        timeout=300,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that has the wheel, and borrows only the dependencies of this one."""
    home = tmp_path_factory.mktemp("wheel-env")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=120)
    python = home / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    # A path added this way has its own .pth files ignored, so the editable install of the
    # checkout does not leak in.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        timeout=120,
    )
    return home


def test_the_wheel_holds_the_packages_and_the_demo(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert package.replace(".", "/") + "/__init__.py" in names
    for name in ("checkpoint/model.safetensors", "checkpoint/config.json", "prompts.jsonl"):
        assert f"onecast/runtime/demo/{name}" in names
    assert not [name for name in names if name.startswith(("comm/", "runtime/", "tests/"))]


def test_the_installed_wheel_generates_on_two_ranks(installed: Path, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    origin = subprocess.run(
        [installed / "bin" / "python", "-c", "import onecast.comm; print(onecast.comm.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=tmp_path,
        env=environment,
    ).stdout.strip()
    assert origin.startswith(str(installed))
    batch = tmp_path / "batch.jsonl"
    batch.write_text(
        json.dumps(
            {
                "custom_id": "a",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "And the king said", "max_tokens": 8, "temperature": 0},
            }
        )
        + "\n"
    )
    result = subprocess.run(
        [installed / "bin" / "onecast", "demo", f"--input={batch}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
    answer = json.loads(line)
    assert answer["custom_id"] == "a"
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 8
    assert "2 tensor-parallel ranks" in result.stdout
