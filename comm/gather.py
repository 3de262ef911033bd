"""All tensors of a frame into shared memory in as few calls as can be.

Owns the list of buffers that pwritev takes. To copy a small tensor costs a third of a microsecond
before the first byte moves, whoever copies it; one system call takes all small ones at once. Large
ones are copied one by one, as the kernel looks up every page that it writes to. Knows nothing of
frames beyond where their tensors lie.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .region import Placement

_LARGE = 4096  # bytes; two pages or so by the kernel cost as much as a call
_MOST = 1000  # buffers of one system call; Linux takes 1,024
_ZEROS = ctypes.create_string_buffer(64)  # pads what is between two tensors


class Gather:
    """The tensors of a placement, into memory at `address` that is a file's from `offset` on."""

    def __init__(self, fd: int, offset: int, address: int, placement: "Placement") -> None:
        self._large: list[tuple[int, Any, Any]] = []  # which tensor, where to, how much
        self._runs: list[tuple[Callable[[], int], int]] = []  # of small tensors, and their bytes
        self._small: list[tuple[int, memoryview, int]] = []  # which, and where its address goes
        self._source = ctypes.c_void_p()
        run: list[tuple[int, int, int]] = []  # which, where it begins, how long it is
        for index, (dtype, shape, _, first) in enumerate(placement.tensors):
            begin = first * dtype.itemsize
            nbytes = functools.reduce(int.__mul__, shape, dtype.itemsize)
            if nbytes >= _LARGE or len(run) * 2 >= _MOST:
                self._end_run(fd, offset, run)
                run = []
            if nbytes >= _LARGE:
                where = ctypes.c_void_p(address + begin)
                self._large.append((index, where, ctypes.c_size_t(nbytes)))
            elif nbytes:
                run.append((index, begin, nbytes))
        self._end_run(fd, offset, run)
        self._move = _libc().memmove

    def _end_run(self, fd: int, offset: int, run: list[tuple[int, int, int]]) -> None:
        if not run:
            return
        buffers: list[int] = []  # address, length, address, length ...
        places: list[tuple[int, int]] = []
        first = end = run[0][1]
        for index, begin, nbytes in run:
            if begin > end:
                buffers += (ctypes.addressof(_ZEROS), begin - end)
            places.append((index, len(buffers)))
            buffers += (0, nbytes)
            end = begin + nbytes
        array = (ctypes.c_uint64 * len(buffers))(*buffers)
        words = memoryview(array).cast("B").cast("Q")
        self._small += [(index, words, at) for index, at in places]
        call = functools.partial(
            _libc().pwritev,
            ctypes.c_int(fd),
            ctypes.byref(array),
            ctypes.c_int(len(buffers) // 2),
            ctypes.c_long(offset + first),
        )
        self._runs.append((call, end - first))

    def write(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Copy; the tensors must be contiguous, on the CPU, and as the placement says.

        False: not all could be written, copy them in another way.
        """
        for index, words, at in self._small:
            words[at] = tensors[index].data_ptr()
        for call, nbytes in self._runs:
            if call() != nbytes:
                return False
        source = self._source
        for index, where, size in self._large:
            source.value = tensors[index].data_ptr()
            self._move(where, source, size)
        return True


@functools.cache
def _libc() -> Any:
    """The C library, called without giving up the interpreter lock: the calls are short."""
    libc = ctypes.PyDLL(None)
    libc.memmove.restype = None
    return libc
