"""The one error of this package that is not a ValueError.

Bad settings raise ValueError; TelemetryError says that something around this process (shared
memory, the sidecar) is not as it must be.
"""


class TelemetryError(RuntimeError):
    """Telemetry could not start or answer; the message says what and why."""
