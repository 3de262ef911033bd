"""Keeps forked children (data loader workers, say) out of the shared memory of their parent.

Owns one hook that runs in a child right after the fork. There it puts fresh private memory in the
place of each shared mapping it was told of, at the same address: whatever a child inherited that
still writes there (a patched collective, an open step) writes to itself, and the hot path has
nothing to check. Knows nothing of what the mappings hold.
"""

import ctypes
import mmap
import os
import weakref

# mmap's constants of Linux that the mmap module does not name
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_addresses: "weakref.WeakKeyDictionary[mmap.mmap, int]" = weakref.WeakKeyDictionary()
_libc: ctypes.CDLL | None = None


def keep_from_children(mapping: mmap.mmap) -> None:
    """From now on children forked from this process get a private, empty copy of `mapping`."""
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)  # not in the child: it must not load anything
        _libc.mmap.restype = ctypes.c_void_p
        _libc.mmap.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        )  # fmt: skip
        os.register_at_fork(after_in_child=_replace_all)
    _addresses[mapping] = ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _replace_all() -> None:
    assert _libc is not None
    for mapping, address in list(_addresses.items()):
        if mapping.closed:  # somebody else may live there now
            continue
        found = _libc.mmap(
            address, len(mapping), mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0,
        )  # fmt: skip
        if found == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot part from the parent's memory: {os.strerror(number)}")
    _addresses.clear()
