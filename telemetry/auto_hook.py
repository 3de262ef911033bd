"""Waits, at no cost, for the moment a process becomes a rank: the first process group it makes.

Owns two small patches and their removal. The first is a finder in `sys.meta_path` that looks at
one module name and is gone once torch's module of that name has run; the second stands in for the
function in it that makes process groups, and is gone after the first. So the torchrun launcher,
data loader workers and every other process of a program, which all import torch and never make a
group, keep torch as it is and load nothing of ours.

Knows nothing of telemetry, and imports nothing outside the standard library: `autoload` loads
this file by its path, before and often instead of the package.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing alone would take longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    # What is told of the first group: the ProcessGroup, and the Store it came up with.
    FirstGroup = Callable[[Any, Any], None]

MODULE = "torch.distributed.distributed_c10d"
FUNCTION = "_new_process_group_helper"
_STORE = 4  # where the function has the store among its arguments


class _Loader:
    """Another loader, and one more thing to do once it has run the module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class GroupHook:
    """Calls `first_group(group, store)` once, right after this process made its first group.

    What it raises is said on stderr and goes no further: the program comes first.
    """

    def __init__(self, first_group: FirstGroup) -> None:
        self._first_group = first_group
        self._module: ModuleType | None = None
        self._original: Callable[..., Any] | None = None
        self._replacement: Callable[..., Any] | None = None
        self._finding = False

    @property
    def installed(self) -> bool:
        return self in sys.meta_path or self._replacement is not None

    def install(self) -> None:
        """Wait for the first group; if another hook does so already, leave it to that one."""
        if any(hook.installed for hook in _hooks):
            return
        _hooks.append(self)
        module = sys.modules.get(MODULE)
        if module is not None:
            self._arm(module)
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Leave everything as `install` found it; what lies on top of us stays."""
        if self in _hooks:
            _hooks.remove(self)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._replacement is not None:
            if getattr(self._module, FUNCTION, None) is self._replacement:
                setattr(self._module, FUNCTION, self._original)
            self._module = self._original = self._replacement = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE or self._finding:
            return None
        self._finding = True  # another hook may ask all finders again
        try:
            for finder in list(sys.meta_path):
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        loader: Any = _Loader(spec.loader, self._imported)
                        spec.loader = loader
                    return spec
        finally:
            self._finding = False
        return None

    def _imported(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._arm(module)

    def _arm(self, module: ModuleType) -> None:
        original = getattr(module, FUNCTION, None)
        if original is None:
            say(f"this torch has no {MODULE}.{FUNCTION}: collectives are not recorded")
            return
        if self._replacement is not None:
            return

        def new_group(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if self._replacement is new_group:
                self.remove()
                store = args[_STORE] if len(args) > _STORE else kwargs.get("store")
                try:
                    self._first_group(made[0], store)
                except Exception as error:
                    say(f"nothing is recorded: {type(error).__name__}: {error}")
            return made

        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(new_group, name, getattr(original, name))
        self._module, self._original, self._replacement = module, original, new_group
        setattr(module, FUNCTION, new_group)


_hooks: list[GroupHook] = []  # of this process: one at most


def say(text: str) -> None:
    """One line to whoever started the program; logging may not be set up, nor ours to set up."""
    print(f"onecast telemetry: {text}", file=sys.stderr, flush=True)
