"""Sleeping on a 32-bit word of shared memory until another process changes it, and full fences.

Owns the futex system call, through ctypes, and memory ordering from Python. Knows nothing of what
the word means. The same for every process that maps the memory; no private futexes.
"""

import ctypes
import functools
import mmap
import platform
import threading
from collections.abc import Callable
from typing import Any

_WAIT, _WAKE = 0, 1
_EVERYONE = 0x7FFFFFFF
_NUMBERS = {"x86_64": 202, "AMD64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}
_TOTAL_STORE_ORDER = {"x86_64", "AMD64"}

_EAGAIN = 11


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class Futex:
    """The word at `offset` of a writable shared mapping; 4 bytes, aligned."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        assert offset % 4 == 0
        sleeps, wakes = _calls()
        number = ctypes.c_long(_NUMBERS[platform.machine()])
        # Arguments made once: converting them anew would cost as much as the system call.
        self._word = ctypes.c_uint32.from_buffer(memory, offset)  # keeps the mapping alive
        address = ctypes.byref(self._word)
        self._timespec = _Timespec()
        self._expected = ctypes.c_uint32()
        wait = (number, address, ctypes.c_int(_WAIT), self._expected)
        self._wait = functools.partial(sleeps, *wait, ctypes.byref(self._timespec), None, 0)
        wake = (number, address, ctypes.c_int(_WAKE), ctypes.c_int(_EVERYONE))
        self._wake = functools.partial(wakes, *wake, None, None, 0)

    def wait(self, expected: int, timeout_ns: int) -> None:
        """Sleep while the word's value is `expected` (its low 32 bits), `timeout_ns` at most.

        Returns for any reason: the caller looks again. Other threads of Python run meanwhile.
        """
        self._expected.value = expected & 0xFFFFFFFF
        self._timespec.seconds, self._timespec.nanoseconds = divmod(timeout_ns, 1_000_000_000)
        self._wait()

    def wake(self) -> None:
        """Wake all that sleep on the word."""
        self._wake()


def unsupported() -> str | None:
    """Why futexes cannot be used here; None: they can."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _NUMBERS:
        return f"the number of the futex call on {platform.system()} {machine} is not known"
    word = ctypes.c_uint32(1)
    call = ctypes.CDLL(None, use_errno=True).syscall
    # The word differs from what is expected: a kernel that lets us call says so at once.
    result = call(
        ctypes.c_long(_NUMBERS[machine]),
        ctypes.byref(word),
        _WAIT,
        0,
        ctypes.byref(_Timespec()),
        None,
        0,
    )
    error = ctypes.get_errno()
    if result == -1 and error != _EAGAIN:
        return f"the futex call is refused with error {error}"
    return None


def is_weakly_ordered() -> bool:
    """Whether stores may become visible in another order than they were made, or loads be early.

    x86-64 lets only one thing happen early: a load before an own earlier store to another place.
    """
    return platform.machine() not in _TOTAL_STORE_ORDER


def make_fence() -> Callable[[], object]:
    """A full memory fence, as a function: what is before it is visible before what is after it.

    Python has no atomics. An uncontended lock has: to acquire it is an atomic read-modify-write
    with acquire ordering, to release it one with release ordering. On x86-64 both are locked
    instructions, full fences each. On arm64 neither alone is: earlier stores may sink below the
    acquire and later loads rise above the release. But a release is never overtaken by a later
    acquire (they are sequentially consistent among themselves: STLR, LDAR and the atomics with
    these orderings), so that of two pairs in a row the first release and the second acquire make
    what is before wait for what is after. Compilers do not move accesses of memory across these
    calls, nor across bytecodes.
    """
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def fence_once() -> None:
        acquire()
        release()

    def fence_twice() -> None:
        acquire()
        release()
        acquire()
        release()

    return fence_twice if is_weakly_ordered() else fence_once


@functools.cache
def _calls() -> tuple[Any, Any]:
    """syscall() twice: with the interpreter lock given up, to sleep, and without, to wake."""
    return ctypes.CDLL(None).syscall, ctypes.PyDLL(None).syscall
