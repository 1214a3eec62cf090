"""Ways to compute the same thing, timed in turns: on a machine whose speed drifts, only ratios from one run mean much.

Each way is run twice before it is timed. In every round each way that is due first runs untimed for about a
millisecond, where it is cheap: torch, MKL, XLA and SciPy keep their own pools of threads, those of the last one still
spin when the next begins, and its data and code are still in the caches. Who follows whom changes from round to round.
The first way is ours; it is what pytest-benchmark itself times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Way = Callable[[], Any]

_CHEAP = 5e-3  # seconds up to which a run is worth one more to settle threads and caches
_SETTLE = 1e-3  # seconds that this should take, in at most ...
_MOST_SETTLE = 5  # ... so many runs
_LONG = 0.4  # seconds above which a way is timed once only: what takes so long has lost by a wide margin


class Comparison:
    """Times ways in turns, and leaves all medians and counts with pytest-benchmark."""

    def __init__(self, benchmark: Any, device: torch.device, *, quick: bool = False, part: float = 1.0) -> None:
        self.benchmark, self.device, self.quick, self.part = benchmark, device, quick, part

    def __call__(
        self,
        ways: Mapping[str, Way],
        *,
        share: float = 0.3,
        most: int = 31,
        rest: float = 0.0,
        settle: float = _SETTLE,
        skipped: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> dict[str, float]:
        """Return the median seconds of each way, given about `share` seconds to run in and at most `most` rounds.

        Before each timed run there are `rest` seconds of sleep, in which the threads of the way before it go to sleep,
        and about `settle` seconds of untimed runs of the same way.
        """
        share, most = (share / 10, 3) if self.quick else (share * self.part, most)
        names = list(ways)
        ours = names[0]
        costs = {name: self._warmed(ways[name]) for name in names}
        runs = {name: _runs(costs[name], share, most) for name in names}
        rounds = max(3, runs[ours])
        taken: dict[str, list[float]] = {name: [] for name in names[1:]}
        turn = 0

        def others() -> None:
            nonlocal turn
            first = turn % max(1, len(taken))
            for name, samples in [*taken.items()][first:] + [*taken.items()][:first]:
                n = min(runs[name], rounds)
                if (turn + 1) * n // rounds > turn * n // rounds:  # runs of slow ways are spread over the rounds
                    self._settle(ways[name], costs[name], rest, settle)
                    samples.append(self._timed(ways[name]))
            self._settle(ways[ours], costs[ours], rest, settle)
            turn += 1

        def own() -> None:
            ways[ours]()
            self._wait()

        self.benchmark.pedantic(own, setup=others, rounds=rounds, iterations=1)
        medians = {ours: self.benchmark.stats.stats.median} if self.benchmark.stats else {}
        medians |= {name: statistics.median(samples) for name, samples in taken.items()}
        counts = {ours: rounds} | {name: len(samples) for name, samples in taken.items()}
        self.benchmark.extra_info.update(facts, seconds=medians, runs=counts, skipped=dict(skipped or {}))
        return medians

    def skip(self, skipped: Mapping[str, str], **facts: Any) -> None:
        """Record why nothing is timed."""
        self.benchmark.pedantic(lambda: None, rounds=1, iterations=1)
        self.benchmark.extra_info.update(facts, seconds={}, runs={}, skipped=dict(skipped))

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _timed(self, way: Way) -> float:
        self._wait()
        start = time.perf_counter()
        way()
        self._wait()
        return time.perf_counter() - start

    def _warmed(self, way: Way) -> float:
        """Return the time of a second run, or of the first one where that was long."""
        first = self._timed(way)
        return first if first > _LONG else self._timed(way)

    def _settle(self, way: Way, cost: float, rest: float, settle: float) -> None:
        time.sleep(rest)
        if cost < _CHEAP:
            for _ in range(max(1, min(_MOST_SETTLE, round(settle / max(cost, 1e-9))))):
                way()
            self._wait()


def _runs(cost: float, share: float, most: int) -> int:
    return 1 if cost > _LONG else max(3, min(most, int(share / max(cost, 1e-7))))
