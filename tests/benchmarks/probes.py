"""What needs a fresh process to measure: `python probes.py import|build DEVICE|memory SIZE` prints numbers as JSON."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path


def imports() -> dict[str, float]:
    """Return the seconds of `import torch`, of `import adjointlab` after it, and of first using every name in it."""
    marks = [time.perf_counter()]
    import torch  # noqa: F401

    marks.append(time.perf_counter())
    import adjointlab

    marks.append(time.perf_counter())
    for name in adjointlab.__all__:
        getattr(adjointlab, name)
    marks.append(time.perf_counter())
    torch_time, package, names = (b - a for a, b in itertools.pairwise(marks))
    return {"torch": torch_time, "adjointlab": package, "all names": names}


def build(device: str) -> dict[str, float]:
    """Return the seconds until the first adjoint of a convolution, of the first operator in a process and of others."""
    import torch

    import adjointlab as al

    def once(size: int, width: int) -> float:
        module = torch.nn.Conv2d(1, 1, width, padding=width // 2, bias=False, device=device)
        v = torch.randn(1, 1, size, size, device=device)
        float(v.sum())  # a device has begun
        start = time.perf_counter()
        float(al.linear_operator(module, v).H(v).detach().sum())  # when it is there
        return time.perf_counter() - start

    first = once(128, 5)
    return {
        "first": first,
        "after, 128²·5²": statistics.median(once(128 + i, 5) for i in range(5)),
        "after, 256²·3²": statistics.median(once(256 + i, 3) for i in range(5)),
        "after, 512²·11²": statistics.median(once(512 + i, 11) for i in range(3)),
    }


def memory(size: str) -> dict[str, float]:
    """Return the peak bytes that torch's allocator holds above baseline, for 12 convolutions of 8 channels."""
    import torch
    from torch import nn
    from torch.profiler import ProfilerActivity, profile

    import adjointlab as al

    torch.manual_seed(0)
    chain = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(12)])
    x = torch.randn(1, 8, int(size), int(size))
    A = al.linear_operator(chain, x)
    plain = al.linear_operator(chain, x, lowering=False)

    def peak(function: Callable[[], object]) -> int:
        function()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most

    ways = {
        "image": lambda: torch.empty_like(x),
        "forward": lambda: chain(x),
        "A(x)": lambda: A(x),
        "eager vjp": lambda: torch.func.vjp(chain, x)[1](x),
        "A.H(v)": lambda: A.H(x),
        "A.H(v), lowering=False": lambda: plain.H(x),
    }
    with torch.no_grad():
        return {name: peak(way) for name, way in ways.items()}


def recurrence(way: str, steps: str, size: str) -> dict[str, float]:
    """Return the most memory of this process above what it has before, for a wave; inputs and outputs are in it."""
    import torch
    from bench_recurrences import Wave

    import adjointlab as al

    torch.set_num_threads(1)
    n, wave = int(size), Wave(torch.full((int(size), int(size)), 1500.0))

    def run(count: int) -> None:
        inverse = wave.back if way.endswith("inverse") else None
        A = al.recurrence(wave, (torch.zeros(n, n), torch.zeros(n, n)), inputs=(count,), inverse=inverse)
        if way.startswith("gradient"):
            A(torch.randn(count)).square().sum().backward()
            return
        with torch.no_grad():
            A(A.domain.randn()) if way == "A" else A.H(A.codomain.randn())

    def held(name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    run(4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    run(int(steps))
    return {"bytes": held("VmHWM") - before}


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    print(json.dumps({"import": imports, "build": build, "memory": memory, "recurrence": recurrence}[kind](*rest)))
