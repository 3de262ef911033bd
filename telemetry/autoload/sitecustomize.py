"""What `onecast telemetry run` puts into every Python process of a program.

Python imports `sitecustomize` at its start, from the first directory of its path that has one. This
one hands over to the next, so that a program or a system keeps its own, and then waits for the
process to become a rank of torch.distributed. It costs every process about a millisecond; the
package `onecast.telemetry` is loaded by ranks alone.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader

TYPE_CHECKING = False  # typing alone would take longer to import than all that is done here
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _first_group(group: Any, store: Any) -> None:
    try:
        auto = import_module("onecast.telemetry.auto")
    except ImportError as error:
        raise ImportError(f"{sys.executable} cannot import onecast ({error})") from error
    auto.start(group, store)


def _wait_for_a_group() -> None:
    name = "onecast.telemetry.auto_hook"  # the package will find it under its name
    path = os.path.join(os.path.dirname(_HERE), "auto_hook.py")
    module = type(sys)(name)
    module.__file__ = path
    loader = SourceFileLoader(name, path)
    module.__loader__ = loader
    loader.exec_module(module)
    sys.modules[name] = module
    module.GroupHook(_first_group).install()


def _hand_over() -> None:
    """Run the sitecustomize that would have been imported without this one."""
    path = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = type(sys)(spec.name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true":
    _wait_for_a_group()
_hand_over()
