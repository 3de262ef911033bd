"""One piece of memory that several processes map: made by one rank, attached to by others.

Owns the file behind it and its mappings. Knows nothing of what lies in it. The file has no name: it
is a memfd, reached by other ranks as /proc/PID/fd/N, so no SIGKILL at any moment can leave it
behind, and the size of /dev/shm does not matter. It is readable and writable for its owner only,
all its pages are reserved when they are added (so that no access can end in a SIGBUS), and it is
sealed against shrinking.

    bytes 0 to 8 of every segment hold a random key that the other ranks check: a descriptor number
    that has changed hands does not pass for the segment
"""

import ctypes
import errno
import fcntl
import mmap
import os
import secrets

from .errors import CannotShare

PAGE = mmap.PAGESIZE
_KEY = slice(0, 8)
_PUNCH_HOLE = 0x02 | 0x01  # and keep the size
_POPULATE_BYTES = 64 << 20  # larger areas are mapped page by page, on first use
_ASK_FIRST_BYTES = 64 << 20


class Segment:
    """An open memory file."""

    def __init__(self, fd: int, key: int) -> None:
        self.fd = fd
        self.key = key

    @classmethod
    def create(cls, nbytes: int) -> "Segment":
        """Raises CannotShare if there is not so much memory."""
        assert nbytes % PAGE == 0
        fd = os.memfd_create("onecast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)
        segment = cls(fd, secrets.randbits(63))
        try:
            segment.extend(nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            memory = segment.map(0, PAGE)
            memory[_KEY] = segment.key.to_bytes(8, "little")
        except BaseException:
            segment.close()
            raise
        return segment

    @classmethod
    def attach(cls, pid: int, fd: int, key: int) -> "Segment":
        """The segment that process `pid` has open as `fd`; raises OSError, CannotShare."""
        segment = cls(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), key)
        try:
            found = os.pread(segment.fd, 8, 0)
            if int.from_bytes(found, "little") != key or len(found) != 8:
                raise CannotShare(f"descriptor {fd} of process {pid} is not the segment awaited")
        except BaseException:
            segment.close()
            raise
        return segment

    def extend(self, nbytes: int) -> int:
        """Add `nbytes` of reserved memory; where they begin. Raises CannotShare."""
        size = os.fstat(self.fd).st_size
        # The kernel grants a memory file all there is, and then kills whoever it likes.
        if nbytes >= _ASK_FIRST_BYTES and nbytes > (available := _available_bytes()):
            raise CannotShare(
                f"{nbytes:,} bytes of shared memory cannot be had: {available:,} are available"
            )
        try:
            os.posix_fallocate(self.fd, size, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            raise CannotShare(
                f"{nbytes:,} bytes of shared memory cannot be had, besides {self.reserved:,} "
                f"reserved before: {error.strerror}"
            ) from error
        return size

    def give_back(self, offset: int, nbytes: int) -> None:
        """Return a part to the system; who still looks at it finds zeros."""
        call = ctypes.CDLL(None, use_errno=True).fallocate
        arguments = (ctypes.c_int(self.fd), ctypes.c_int(_PUNCH_HOLE))
        if call(*arguments, ctypes.c_long(offset), ctypes.c_long(nbytes)) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"cannot give memory back: {os.strerror(error)}")

    @property
    def reserved(self) -> int:
        """Bytes of memory that the segment takes."""
        return os.fstat(self.fd).st_blocks * 512

    def map(self, offset: int, nbytes: int) -> mmap.mmap:
        """A view of a part; it lives as long as anything that uses it."""
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if nbytes <= _POPULATE_BYTES else 0)
        return mmap.mmap(self.fd, nbytes, flags=flags, offset=offset)

    def close(self) -> None:
        """Give the descriptor back; mappings stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def _available_bytes() -> int:
    """Memory that the kernel says it can give without taking it from anyone."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
