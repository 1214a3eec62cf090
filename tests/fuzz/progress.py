"""Progress of a long run, in plain lines."""

import time
from collections.abc import Iterator
from typing import Any


def shown(items: range, what: str) -> Iterator[Any]:
    """Return the items, and print how far it is every 5 %."""
    start, total = time.monotonic(), len(items)
    for count, item in enumerate(items):
        if total >= 200 and count % (total // 20) == 0 and count:
            print(f"{count} of {total} {what}, {time.monotonic() - start:.0f} s", flush=True)
        yield item
