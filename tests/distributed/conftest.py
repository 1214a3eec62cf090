"""One process group for each number of processes, and another one once a test has broken it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from processes import Group


@pytest.fixture(scope="package")
def groups() -> Iterator[Callable[[int], Group]]:
    """The process group of a size, started when it is first asked for."""
    started: dict[int, Group] = {}

    def of_size(size: int) -> Group:
        if size in started and not started[size].alive():
            started.pop(size).close()
        if size not in started:
            started[size] = Group(size)
        return started[size]

    yield of_size
    for group in started.values():
        group.close()


@pytest.fixture
def group(groups: Callable[[int], Group]) -> Group:
    """Three processes: one has a neighbour on both sides."""
    return groups(3)
