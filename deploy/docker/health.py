"""Whether what runs in this container is well: exit status 0, or 1 and why, for a health check.

Owns one question over HTTP to this container's own address, `ONECAST_HEALTH_URL`. Knows nothing of
what answers: by default it is the telemetry sidecar, and for `onecast serve` its own /health. Needs
the standard library alone.
"""

import os
import sys
import urllib.request

DEFAULT_URL = "http://127.0.0.1:9464/-/healthy"
_TIMEOUT_S = 3.0


def main() -> int:
    url = os.environ.get("ONECAST_HEALTH_URL") or DEFAULT_URL
    # A proxy of the environment has no business with a question to oneself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S):
            return 0
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors; a URL may be none
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
