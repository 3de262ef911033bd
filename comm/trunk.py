"""One broadcast a frame among the leaders of hosts, straight from and to the slots of their rings.

Owns the order of broadcasts and what becomes of their errors, as `process_group` draws them: all
leaders broadcast `capacity` bytes, and the rest in a second broadcast where a frame outgrows that.
Knows nothing of rings or metadata.

    slot of the source's ring  --capacity bytes-->  slots of the other leaders' rings
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from .errors import CommError, PeerLost, PublishTimeout, ReceiveTimeout
from .frame import write_goodbye
from .header import Header, check_metadata, read_header
from .ladder import Capacity, rung
from .lookout import Lookout
from .private_group import PrivateGroup
from .region import Region
from .staging import HostStaging

Room = Callable[[int], Region]  # memory for so many bytes of the next frame; the same until it came


class Trunk:
    """One leader's end. `leaders` are global ranks, `src` is one of them."""

    def __init__(
        self,
        group: PrivateGroup,
        leaders: Sequence[int],
        src: int,
        origin: int,
        lookout: Lookout,
        timeout_s: float,
    ) -> None:
        self.sequence = 0
        self.broadcasts = 0
        self._group = group
        self._others = [rank for rank in leaders if rank != dist.get_rank()]
        self._src = src
        self._is_source = dist.get_rank() == src
        self._origin = origin
        self._lookout = lookout
        self._timeout_s = timeout_s
        self._capacity = Capacity()
        self._host = HostStaging()  # knows how to ask and wait for a broadcast of host memory
        self._pending: dist.Work | None = None  # a broadcast under way
        self._region: Region | None = None  # where the frame comes, from its first broadcast on
        self._front: Header | None = None  # of the frame whose rest is due
        self._kept: torch.Tensor | None = None  # the front of the frame, on its way to more room

    def room(self, total: int) -> int:
        """How much memory a frame of `total` bytes needs: what is broadcast."""
        capacity = self._capacity.nbytes
        return capacity if total <= capacity else rung(total)

    def check(self) -> None:
        """Raise PeerLost if anyone is known to be gone; a look every tenth of a second."""
        gone = self._lookout.gone_lately()
        if gone is not None:
            raise PeerLost(gone[0], f"{gone[1]} before frame {self.sequence} was published")

    def send(self, region: Region, total: int) -> None:
        """Send the frame that lies in `region`, which has the room it needs."""
        capacity = self._capacity.nbytes
        deadline_ns = time.monotonic_ns() + int(self._timeout_s * 1e9)
        self._broadcast(region, 0, capacity)
        self._await(deadline_ns)
        if total > capacity:
            self._broadcast(region, capacity, total)
            self._await(deadline_ns)
        self._capacity.saw(total)
        self.sequence += 1

    def send_goodbye(self) -> None:
        """Tell the other leaders that there are no more frames."""
        region = Region(torch.zeros(self._capacity.nbytes, dtype=torch.uint8, device="cpu"))
        write_goodbye(self.sequence, self._origin, region)
        self.send(region, 0)

    def receive(self, room: Room, deadline_ns: int) -> tuple[Header, Region]:
        """The next frame and where it lies, in memory that `room` gave.

        Raises ReceiveTimeout, after which the same call goes on, FrameError and PeerLost, and what
        `room` raises; after a time-out of that the same call goes on too.
        """
        capacity = self._capacity.nbytes
        header = self._front
        if header is None:
            if self._pending is None:
                self._region = room(capacity)
                self._broadcast(self._region, 0, capacity)
            self._await(deadline_ns)
            header = read_header(self._memory(capacity), self.sequence, self._origin)
            if header.total > capacity:
                self._front = header
        if header.total > capacity:
            if self._pending is None:
                self._broadcast(self._move(room, header.total), capacity, header.total)
            self._await(deadline_ns)
            self._front = None
            check_metadata(header, self._memory(header.total))
        self._capacity.saw(header.total)
        self.sequence += 1
        assert self._region is not None
        return header, self._region

    def close(self) -> None:
        self._group.close(busy=self._pending is not None)

    def _memory(self, nbytes: int) -> memoryview:
        assert self._region is not None and self._region.memory is not None
        return self._region.memory[:nbytes]

    def _move(self, room: Room, total: int) -> Region:
        """Room for all of a frame whose front is here."""
        assert self._region is not None
        capacity = self._capacity.nbytes
        if self._kept is None:  # first: with more room the memory before may go
            self._kept = self._region.tensor[:capacity].clone()
        self._region = room(rung(total))
        self._region.tensor[:capacity].copy_(self._kept)
        self._kept = None
        return self._region

    def _broadcast(self, region: Region, begin: int, end: int) -> None:
        if not self._group.exists():
            raise CommError("the process groups were destroyed before the channel was closed")
        self.broadcasts += 1
        wire, group = region.tensor[begin:end], self._group.handle
        try:
            work: dist.Work | None = dist.broadcast(wire, src=self._src, group=group, async_op=True)
        except RuntimeError as error:
            raise self._failure(error) from error
        assert work is not None
        self._pending = work

    def _await(self, deadline_ns: int) -> None:
        """Until the pending broadcast is over; raises PeerLost, and the time-out of this side."""
        work, host, lookout = self._pending, self._host, self._lookout
        assert work is not None
        start_ns = time.monotonic_ns()
        try:
            done = lookout.wait(partial(host.arrived, work), partial(host.sleep, work), deadline_ns)
        except RuntimeError as error:
            self._pending = None
            raise self._failure(error) from error
        if done:
            self._pending = None
            return
        gone = lookout.gone()
        if gone is not None:
            raise PeerLost(gone[0], f"{gone[1]} while this rank waited for {self._awaited()}")
        waited = f"{(time.monotonic_ns() - start_ns) / 1e9:.3g} s"
        text = f"waited {waited} in vain for {self._awaited()}"
        if not self._is_source:
            raise ReceiveTimeout(f"{text} ({lookout.describe()})")
        under_way = "a broadcast is under way, so the channel cannot be used any more"
        raise PublishTimeout(f"{text}; {under_way} ({lookout.describe()})")

    def _awaited(self) -> str:
        if self._is_source:
            return f"the leaders of the other hosts, ranks {self._others}, to take it"
        rest = "the rest of " if self._front is not None else ""
        return f"{rest}frame {self.sequence} from rank {self._src}"

    def _failure(self, error: RuntimeError) -> CommError:
        """What a failed broadcast means: a connection is lost, the process group says why."""
        gone = self._lookout.find_gone()
        if gone is not None:
            return PeerLost(gone[0], f"{gone[1]}; the broadcast: {error}")
        return PeerLost(self._others[0] if len(self._others) == 1 else None, str(error))
