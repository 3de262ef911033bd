"""Waiting for a process to become a rank: nothing before, one call then, no trace after."""

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onecast.telemetry.auto_hook import FUNCTION, MODULE, GroupHook
from onecast.telemetry.run_command import AUTOLOAD

MAKES_GROUPS = """
def _new_process_group_helper(size, rank, ranks, backend, store, name, timeout=None):
    "the original"
    return f"group {name}", store
ORIGINAL = _new_process_group_helper
"""


@pytest.fixture
def torch_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Not torch, but a module of another name that makes groups, not imported yet."""
    (tmp_path / "makes_groups.py").write_text(MAKES_GROUPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("onecast.telemetry.auto_hook.MODULE", "makes_groups")
    yield "makes_groups"
    sys.modules.pop("makes_groups", None)


def test_the_first_group_is_told_once_and_nothing_stays(torch_module: str) -> None:
    told: list[tuple[Any, Any]] = []
    finders = list(sys.meta_path)
    hook = GroupHook(lambda group, store: told.append((group, store)))
    hook.install()
    assert importlib.util.find_spec(torch_module) is not None  # looking is not importing
    module = importlib.import_module(torch_module)
    assert sys.meta_path == finders
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__ is not None and module.__spec__.loader is module.__loader__
    assert getattr(module, FUNCTION).__doc__ == "the original"
    assert hook.installed

    made = getattr(module, FUNCTION)(2, 0, [], "gloo", "the store", "world", timeout=1)
    assert made == ("group world", "the store") and told == [("group world", "the store")]
    assert getattr(module, FUNCTION) is module.ORIGINAL
    assert not hook.installed
    getattr(module, FUNCTION)(2, 0, [0], "gloo", "the store", "another")
    assert len(told) == 1


def test_a_module_that_is_there_already_is_watched_too(torch_module: str) -> None:
    module = importlib.import_module(torch_module)
    told: list[Any] = []
    hook = GroupHook(lambda group, store: told.append((group, store)))
    hook.install()
    getattr(module, FUNCTION)(1, 0, [], "gloo", name="world", store="by keyword")
    assert told == [("group world", "by keyword")]


@pytest.mark.parametrize("imported", [False, True])
def test_removing_it_leaves_everything_as_it_was(torch_module: str, imported: bool) -> None:
    finders = list(sys.meta_path)
    hook = GroupHook(lambda group, store: pytest.fail("it is removed"))
    hook.install()
    if imported:
        importlib.import_module(torch_module)
    hook.remove()
    module = importlib.import_module(torch_module)
    assert getattr(module, FUNCTION) is module.ORIGINAL and sys.meta_path == finders
    getattr(module, FUNCTION)(1, 0, [], "gloo", None, "world")
    hook.remove()


def test_of_two_hooks_one_waits(torch_module: str) -> None:
    told: list[str] = []
    first = GroupHook(lambda group, store: told.append("first"))
    second = GroupHook(lambda group, store: told.append("second"))
    first.install()
    second.install()
    module = importlib.import_module(torch_module)
    getattr(module, FUNCTION)(1, 0, [], "gloo", None, "world")
    assert told == ["first"] and getattr(module, FUNCTION) is module.ORIGINAL
    second.install()  # the first has had its group
    assert second.installed
    second.remove()


def test_an_error_of_ours_is_one_line_and_the_group_is_made(
    torch_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(group: Any, store: Any) -> None:
        raise ValueError("hang_s is -1")

    GroupHook(fails).install()
    module = importlib.import_module(torch_module)
    assert getattr(module, FUNCTION)(1, 0, [], "gloo", None, "world")[0] == "group world"
    said = capsys.readouterr().err
    assert said == ("onecast telemetry: nothing is recorded: ValueError: hang_s is -1\n")


def test_a_torch_without_that_function_is_named(
    torch_module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "makes_groups.py").write_text("")
    hook = GroupHook(lambda group, store: None)
    hook.install()
    importlib.import_module(torch_module)
    assert "this torch has no makes_groups" in capsys.readouterr().err
    hook.remove()


def test_this_torch_makes_its_groups_there() -> None:
    import inspect

    import torch.distributed.distributed_c10d as module

    assert module.__name__ == MODULE
    parameters = list(inspect.signature(getattr(module, FUNCTION)).parameters)
    assert parameters[4] == "store"


def python(code: str, *path: Path | str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **variables}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_process_that_is_no_rank_loads_nothing_of_ours() -> None:
    result = python(
        """
        import sys
        ours = sorted(name for name in sys.modules if name.startswith("onecast"))
        heavy = {"numpy", "torch", "opentelemetry", "typing", "logging"} & {*sys.modules}
        print(ours, heavy, [type(finder).__name__ for finder in sys.meta_path].count("GroupHook"))
        """,
        AUTOLOAD,
    )
    assert result.stderr == ""
    assert result.stdout == "['onecast.telemetry.auto_hook'] set() 1\n"


def test_a_disabled_sdk_disables_the_waiting() -> None:
    result = python(
        "import sys; print([name for name in sys.modules if name.startswith('onecast')])",
        AUTOLOAD,
        OTEL_SDK_DISABLED="true",
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_another_sitecustomize_is_run_as_if_ours_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("RAN = [__name__, __file__]\n")
    result = python("import sitecustomize; print(sitecustomize.RAN)", AUTOLOAD, tmp_path)
    assert result.stderr == ""
    assert result.stdout == f"{['sitecustomize', str(tmp_path / 'sitecustomize.py')]}\n"


def test_an_error_in_another_sitecustomize_is_said_as_ever(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise KeyError('theirs')\n")
    alone = python("print('goes on')", tmp_path)
    chained = python("print('goes on')", AUTOLOAD, tmp_path)
    assert (chained.stdout, chained.stderr) == (alone.stdout, alone.stderr) != ("", "")


def test_a_python_without_our_package_says_so_and_goes_on(tmp_path: Path) -> None:
    home = tmp_path / "torch" / "distributed"
    home.mkdir(parents=True)
    for package in (home.parent, home):
        (package / "__init__.py").touch()
    (home / "distributed_c10d.py").write_text(MAKES_GROUPS)
    code = """
        import sys
        from torch.distributed.distributed_c10d import _new_process_group_helper as make
        sys.modules["onecast"] = None
        print(make(1, 0, [], "gloo", None, "world")[0])
        """
    result = python(code, AUTOLOAD, tmp_path)
    assert result.stdout == "group world\n"
    assert f"{sys.executable} cannot import onecast" in result.stderr
    assert len(result.stderr.splitlines()) == 1
