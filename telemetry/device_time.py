"""How long a collective took on the GPU, from CUDA events, without ever waiting for the GPU.

Owns the events around an operation, when they are recorded and when they are asked. Refuses to
know metrics and spans: what it finds out goes into the ring as DEVICE records, late and in any
order.

What is measured, on NCCL:

    user's stream   ..compute.. [begin] [NCCL kernel] [end] ..compute..        async_op=False

    user's stream   ..compute.. [begin] ..compute.. wait ..compute..           async_op=True
    NCCL's stream                  [NCCL kernel] .
    side stream                                  ..[end]

    begin   on the stream that is current when the operation is issued: the moment at which its
            input is ready. An operation that queues behind others of its group counts the queue.
    end     without a Work (what torch does for async_op=False): the kernel was put on the current
            stream itself, so the very next event there is its end.
    end     with a Work: an event on the current stream after Work.wait would come after all the
            compute that was queued in between, so it goes onto a stream of our own, which first
            waits for the Work. The current stream gets nothing but `begin`.

Why the side stream waits for the Work only once the program has waited for it: whoever waits for a
WorkNCCL first releases the tensors that it keeps alive for the NCCL stream, internal buffers among
them; done any earlier, the allocator could hand out memory that NCCL still writes. Holding the Work
or its future instead would keep the program's output tensors alive, or tie them to another stream.
The price: an operation that was over before the program waited for it has no end anybody knows; it
is not timed, and counted as `over`. What is fully hidden behind compute is thus missing from the
device times (the host times have it).

The side stream is made by the driver, non-blocking, one per group and device: a stream of torch's
pool may be one that the program or NCCL itself uses, and a blocking one would tie itself to the
default stream.

While any CUDA graph is captured nothing is recorded and nothing asked: asking after an event
can invalidate a capture of another thread. Operations between `_start_coalescing` and
`_end_coalescing` of torch's coalescing manager are not timed: their kernels start at its end.
"""

from typing import Any, Protocol


class DeviceTimer(Protocol):
    """What the interception calls around an operation whose payload may lie on a GPU.

    mark = timer.issued(handle, value)        right before the call; None: this one is not timed
    timer.finished(mark, work, step, ...)     right after it, only with a mark
    timer.waited(mark, work)                  right after the Work's own wait has returned
    timer.dropped(mark)                       instead, if the call or the wait raised or the Work
                                              was collected; also for a mark of a Work already waited
    """

    def issued(self, handle: Any, value: Any) -> Any | None:
        """`handle`: the ProcessGroup or Backend; `value`: the payload, a tensor or (nested) list.

        Cheap for what is not on a GPU. None also while a CUDA graph is captured.
        """

    def finished(
        self, mark: Any, work: Any | None, step: int, begin_ns: int, meta: int, sequence: int,
        nbytes: int,
    ) -> None:  # fmt: skip
        """`work`: what the call returned. The rest is what the COLLECTIVE record holds."""

    def waited(self, mark: Any, work: Any) -> None: ...

    def dropped(self, mark: Any) -> None: ...
