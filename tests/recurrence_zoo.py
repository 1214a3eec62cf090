"""Fifteen recurrences, with a plain Python loop as the reference for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al

D, C = torch.float64, torch.complex128


@dataclass(frozen=True)
class Case:
    """A step, its state, and the options of the recurrence."""

    step: Callable[..., Any]
    state: Any
    options: dict[str, Any] = field(default_factory=dict)
    has_outputs: bool = False

    def build(self, **options: Any) -> al.LinearOperator[Any, Any]:
        return al.recurrence(self.step, self.state, **self.options, **options)

    def reference(self, x: Any) -> Any:
        """Return what a loop in Python makes of x, in the sight of autograd."""
        options = self.options
        has_inputs, k = options.get("inputs") is not None, options.get("batch_dims", 0)
        is_initial = options.get("initial", not has_inputs)
        u, inputs = x if is_initial and has_inputs else (x, None) if is_initial else (None, x)
        if u is None:
            batch = pytree.tree_leaves(inputs)[0].shape[:k]
            u = pytree.tree_map(lambda t: torch.zeros((*batch, *t.shape[k:]), dtype=t.dtype), self.state)
        xs = options.get("xs")
        counts = [t.shape[k] for t in pytree.tree_leaves(inputs)] if has_inputs else []
        steps = [*counts, *([] if xs is None else [len(t) for t in pytree.tree_leaves(xs)]), options.get("steps")][0]
        outputs = []
        for t in range(steps):
            given = [pytree.tree_map(lambda i, t=t: i.select(k, t), inputs)] if has_inputs else []
            found = self.step(u, *given, *([] if xs is None else [pytree.tree_map(lambda a, t=t: a[t], xs)]))
            u, o = found if self.has_outputs else (found, None)
            outputs.append(o)
        keeps = self.has_outputs and options.get("outputs", True)
        is_final = options.get("final", not keeps)
        stacked = pytree.tree_map(lambda *entries: torch.stack(entries, k), *outputs) if keeps else None
        return (u, stacked) if is_final and keeps else u if is_final else stacked


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def iir() -> Case:
    """Return the biquad of a low-pass, in transposed direct form."""
    b, a = (0.2, 0.3, 0.1), (-0.4, 0.3)

    def step(w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        o = b[0] * i + w[0]
        return torch.stack([b[1] * i - a[0] * o + w[1], b[2] * i - a[1] * o]), o

    return Case(step, torch.zeros(2, dtype=D), {"inputs": torch.zeros(9, dtype=D)}, has_outputs=True)


class Heat(nn.Module):
    """Explicit steps of the heat equation with a conductivity of its own at each point."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.kappa = nn.Parameter(0.1 + 0.1 * torch.rand(n, n, generator=draw(1), dtype=D))

    def forward(self, u: Tensor) -> Tensor:
        p = F.pad(u[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        return u + self.kappa * (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u)


class Wave(nn.Module):
    """Leapfrog steps of the acoustic wave equation with an absorbing border, a source and three receivers."""

    def __init__(self, n: int, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.speed = nn.Parameter(0.3 + 0.2 * torch.rand(n, n, generator=draw(2), dtype=dtype))
        ramp = torch.linspace(1, 0, n // 3, dtype=dtype)
        edge = torch.cat([ramp, torch.zeros(n - 2 * len(ramp), dtype=dtype), ramp.flip(0)])
        self.register_buffer("damping", 0.2 * torch.maximum(edge[:, None], edge[None]) ** 2)

    def forward(self, state: tuple[Tensor, Tensor], source: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        u, before = state
        p = F.pad(u, (1, 1, 1, 1))
        laplacian = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u
        after = (2 * u - (1 - self.damping) * before + self.speed**2 * laplacian) / (1 + self.damping)
        after = after + F.pad(source.reshape(1, 1), (2, len(u) - 3, 2, len(u) - 3))
        return (after, u), after[1, 1:4]


def wave(**options: Any) -> Case:
    n = 6
    state = (torch.zeros(n, n, dtype=D), torch.zeros(n, n, dtype=D))
    return Case(Wave(n), state, {"inputs": torch.zeros(7, dtype=D), **options}, has_outputs=True)


class Hidden(nn.Module):
    """A linear recurrent network on batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3, bias=False, dtype=D), nn.Linear(2, 3, bias=False, dtype=D)

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inner(h) + self.outer(x)
        return h, h.sum(-1)


def spectral(u: Tensor) -> Tensor:
    """Return a step of the free Schrödinger equation."""
    k = torch.fft.fftfreq(len(u), dtype=D)
    return torch.fft.ifft(torch.exp(-20j * k**2) * torch.fft.fft(u))


def rotation(u: Tensor) -> Tensor:
    c, s = 0.8, 0.6
    return torch.stack([c * u[0] - s * u[1], s * u[0] + c * u[1]])


def coils(u: Tensor, i: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a state seen through a sensitivity and a kernel of each time."""
    u = 0.9 * u + x["gain"] * i
    return u, F.conv1d(x["coil"] * u[None, None], x["kernel"][None, None], padding=1)[0, 0]


def moving(u: Tensor, a: Tensor) -> Tensor:
    return a @ u


def oscillator(state: dict[str, Tensor]) -> dict[str, Tensor]:
    v = state["v"] - 0.1 * state["x"]
    return {"v": v, "x": state["x"] + 0.1 * v}  # not in the order of the state


def several(u: Tensor, i: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    u = 0.5 * u + i["a"] + 1j * i["b"]
    return u, {"square": u.reshape(2, 2).mT, "sum": u.sum(), "conj": u.conj()}


def r(*shape: int, seed: int = 3, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(*shape, generator=draw(seed), dtype=dtype)


def cases() -> dict[str, Case]:
    series = {"gain": r(5, 4, dtype=C), "coil": r(5, 4, dtype=C), "kernel": r(5, 3, dtype=C)}
    matrices = (0.5 * r(6, 3, 3)).requires_grad_()
    return {
        "iir": iir(),
        "heat": Case(Heat(5), torch.zeros(5, 5, dtype=D), {"steps": 6}),
        "wave": wave(),
        "wave, state and traces": wave(initial=True, final=True),
        "wave, final state": wave(outputs=False),
        "rotation": Case(rotation, torch.zeros(2, dtype=D), {"steps": 11}),
        "schrödinger": Case(spectral, torch.zeros(8, dtype=C), {"steps": 5}),
        "hidden, batches": Case(
            Hidden(), torch.zeros(2, 3, dtype=D), {"inputs": torch.zeros(2, 4, 2, dtype=D), "batch_dims": 1},
            has_outputs=True,
        ),
        "coils of each time": Case(
            coils, torch.zeros(4, dtype=C), {"inputs": torch.zeros(5, 4, dtype=C), "xs": series}, has_outputs=True
        ),
        "matrices of each time": Case(moving, torch.zeros(3, dtype=D), {"xs": matrices}),
        "oscillator": Case(
            oscillator, {"x": torch.zeros(3, dtype=D), "v": torch.zeros(3, dtype=D)}, {"steps": 8}
        ),
        "several outputs": Case(
            several, torch.zeros(4, dtype=C),
            {"inputs": {"a": torch.zeros(3, 4, dtype=C), "b": torch.zeros(3, 4, dtype=C)}}, has_outputs=True,
        ),
        "no step": Case(rotation, torch.zeros(2, dtype=D), {"steps": 0}),
        "one step": wave(inputs=torch.zeros(1, dtype=D), initial=True),
        "circular blur": Case(
            nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False, dtype=D), torch.zeros(1, 1, 9, dtype=D),
            {"steps": 4},
        ),
    }  # fmt: skip


ZOO = cases()
