"""What is measured: a way to bring a mapping from rank 0 to the others.

Owns the seam between the exchanges and the methods, and how a channel fits it.
"""

from collections.abc import Mapping
from typing import Any

from onecast.comm import Channel


class Method:
    """One way, open on every rank.

    `send` and `receive` alone are timed; the mapping is in hand when `receive` returns.
    """

    name: str
    nbytes = 0  # of a message, all that travels; on the source, once one was sent
    metadata_bytes = 0  # of those, what is neither tensor nor padding
    messages = 0  # so far
    broadcasts = 0  # so far: dist.broadcast calls

    def prepare(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """What a program that uses this method would have at hand to send."""
        return dict(mapping)

    def send(self, mapping: dict[str, Any]) -> object:
        raise NotImplementedError

    def receive(self, timeout_s: float | None = None) -> Any:
        raise NotImplementedError

    def mapping(self, received: Any) -> Mapping[str, Any] | None:
        """What was received, to be compared with what was sent; None: the method has no mapping."""
        return None

    def release(self, received: Any) -> None:
        """The receiver is done with it."""

    def account(self, sent: Any) -> None:
        """Bring sizes and counters up to date; `sent` is what `send` returned last."""

    def close(self) -> None:
        """A collective call."""


class ChannelMethod(Method):
    """A channel of onecast, or a prior protocol in the shape of one."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self._channel = channel

    def send(self, mapping: dict[str, Any]) -> object:
        return self._channel.publish(mapping)

    def receive(self, timeout_s: float | None = None) -> Any:
        frame = self._channel.receive(timeout_s)
        frame.mapping  # noqa: B018 - in hand
        return frame

    def mapping(self, received: Any) -> Mapping[str, Any]:
        mapping: Mapping[str, Any] = received.mapping
        return mapping

    def release(self, received: Any) -> None:
        received.release()

    def close(self) -> None:
        self._channel.close()

    def account(self, sent: Any) -> None:
        self.nbytes, self.metadata_bytes = sent.nbytes, sent.metadata_bytes
        self.messages, self.broadcasts = self._channel.sequence, self._channel.broadcasts
