"""Gradients by the inverse of a step: equal to those by checkpoints, without states, and refused where it is none."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adjointlab as al
from adjointlab.errors import NotDifferentiableError

D = torch.float64
N = 9
STATE = (torch.zeros(N, N, dtype=D), torch.zeros(N, N, dtype=D))


class Wave(nn.Module):
    """Leapfrog steps, with a source and receivers, and the same back in time."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.speed = nn.Parameter(torch.linspace(0.2, 0.5, N * N, dtype=dtype).reshape(N, N))

    def moved(self, u: Tensor, other: Tensor, source: Tensor) -> Tensor:
        p = F.pad(u, (1, 1, 1, 1))
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        return 2 * u - other + self.speed**2 * (around - 4 * u) + F.pad(source.reshape(1, 1), (3, 5, 4, 4))

    def forward(self, state: tuple[Tensor, Tensor], source: Tensor) -> Any:
        u, before = state
        return (self.moved(u, before, source), u), u[1, ::2]

    def back(self, state: tuple[Tensor, Tensor], source: Tensor) -> tuple[Tensor, Tensor]:
        after, u = state
        return u, self.moved(u, after, source)


class Turned(nn.Module):
    """A rotation by an angle, and a gain of each time."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor([0.3, 1.1], dtype=D))

    def turned(self, u: Tensor, sign: int) -> Tensor:
        c, s = torch.cos(self.angle), sign * torch.sin(self.angle)
        return torch.stack([c * u[0] - s * u[1], s * u[0] + c * u[1]])

    def forward(self, u: Tensor, gain: Tensor) -> Tensor:
        return gain * self.turned(u, 1)

    def back(self, u: Tensor, gain: Tensor) -> Tensor:
        return self.turned(u / gain, -1)


def gains(steps: int) -> Tensor:
    return torch.linspace(0.8, 1.2, steps, dtype=D).requires_grad_()


CASES: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {
    "wave": lambda: (Wave(), STATE, {"inputs": (12,), "initial": True, "final": True}),
    "wave, compiled": lambda: (Wave(), STATE, {"inputs": torch.zeros(12, dtype=D), "engine": "compiled"}),
    "turned": lambda: (Turned(), torch.zeros(2, 2, dtype=D), {"xs": gains(11)}),
    "no step": lambda: (Turned(), torch.zeros(2, 2, dtype=D), {"steps": 1, "xs": gains(1)}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_by_checkpoints(name: str) -> None:
    step, state, options = CASES[name]()
    A, B = (al.recurrence(step, state, **options, **more) for more in ({}, {"inverse": step.back}))
    x = A.domain.unflatten([t.requires_grad_() for t in A.domain.leaves(A.domain.randn())])
    y = A.codomain.randn()
    series = [options["xs"]] if "xs" in options else []
    wanted = [*A.domain.leaves(x), *step.parameters(), *series]
    for make in (lambda C: C.codomain.inner(C(x), y), lambda C: C.domain.inner(C.H(y), x)):
        for one, other in zip(*(torch.autograd.grad(make(C), wanted) for C in (A, B)), strict=True):
            torch.testing.assert_close(one, other)


def test_derivatives_of_both_orders_are_right() -> None:
    step = Turned()
    series = gains(5)
    A = al.recurrence(step, torch.zeros(2, 2, dtype=D), xs=series, inverse=step.back)
    x = A.domain.randn().requires_grad_()
    given = (x, step.angle, series)
    assert torch.autograd.gradcheck(lambda x, *_: A(x), given)
    assert torch.autograd.gradgradcheck(lambda x, *_: A(x), given)


@pytest.mark.parametrize("steps", [50, 400])
def test_no_state_is_kept_but_the_last_and_a_random_one(steps: int) -> None:
    step = Wave()
    A = al.recurrence(step, STATE, inputs=torch.zeros(steps, dtype=D), inverse=step.back)
    before = alive()
    found = A(A.domain.randn())
    assert alive() - before <= 4
    found.sum().backward()
    assert step.speed.grad is not None


def alive() -> int:
    gc.collect()
    return sum(type(item) is Tensor and tuple(item.shape) == (N, N) for item in gc.get_objects())


def test_it_is_copied_moved_and_follows_its_parameters() -> None:
    step = Wave()
    A = al.recurrence(step, STATE, inputs=torch.zeros(12, dtype=D), inverse=step.back)
    B = pickle.loads(pickle.dumps(A))
    x = A.domain.randn()
    with torch.no_grad():
        step.speed.mul_(0.5)
        (other,) = B.parameters()
        other.mul_(0.5)
    expected, found = (torch.autograd.grad(C(x).sum(), list(C.parameters()))[0] for C in (A, B))
    torch.testing.assert_close(found, expected)
    A.to(torch.float32)
    (narrow,) = torch.autograd.grad(A(x.float()).sum(), list(A.parameters()))
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_does_not_undo_the_step_is_refused() -> None:
    step = Turned()
    with pytest.raises(NotDifferentiableError, match=r"at step 0 the state that it returns is off by .* of its norm"):
        al.recurrence(step, torch.zeros(2, 2, dtype=D), xs=gains(5), inverse=step)


def test_an_inverse_of_the_first_steps_alone_is_refused() -> None:
    step = Turned()

    def back(u: Tensor, gain: Tensor) -> Tensor:
        return step.turned(u / 0.8, -1) + 0 * gain

    with pytest.raises(NotDifferentiableError, match=r"at step 2 the state"):
        al.recurrence(step, torch.zeros(2, 2, dtype=D), xs=gains(5), inverse=back)


def test_rounding_that_grows_is_told() -> None:
    gain, m = nn.Parameter(torch.ones(1, dtype=D)), torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=D)
    inverse = torch.tensor([[1.5, -0.5], [-0.5, 1.5]], dtype=D)
    options: dict[str, Any] = {"steps": 60, "inverse": lambda u: inverse @ u / gain}
    A = al.recurrence(lambda u: gain * (m @ u), torch.zeros(2, dtype=D), **options)
    with pytest.raises(NotDifferentiableError, match=r"give the states back to 1\.5e-08 .* leave inverse= out"):
        A(torch.tensor([1.0, 0.3], dtype=D)).sum().backward()


def test_rounding_that_grows_and_is_gone_again_is_told() -> None:
    """Going back, one direction grows and then shrinks: the first state comes back, and those between do not."""
    c, s, one = 0.8, 0.6, torch.ones(1, dtype=D)
    turn, gain = torch.tensor([[c, -s], [s, c]], dtype=D), nn.Parameter(torch.ones(1, dtype=D))
    xs = torch.cat([torch.full((30,), 4.0, dtype=D), torch.full((30,), 0.25, dtype=D)])

    def step(u: Tensor, x: Tensor) -> Tensor:
        return gain * (turn @ (torch.cat([one, x.reshape(1)]) * (turn.mT @ u)))

    def back(u: Tensor, x: Tensor) -> Tensor:
        return turn @ (torch.cat([one, 1 / x.reshape(1)]) * (turn.mT @ u)) / gain

    A = al.recurrence(step, torch.zeros(2, dtype=D), xs=xs, inverse=back)
    image = A(turn @ torch.tensor([1.0, 0], dtype=D))
    with pytest.raises(NotDifferentiableError, match="rounding grows in each step back"):
        image.sum().backward()


def test_steps_that_are_left_to_autograd_have_no_use_for_it() -> None:
    step = Turned()
    with pytest.raises(NotDifferentiableError, match="expected a step and an inverse that can be traced"):
        al.recurrence(step, torch.zeros(2, 2, dtype=D), xs=gains(5), inverse=step.back, engine="eager")


def test_a_step_may_be_its_own_inverse() -> None:
    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angle = nn.Parameter(torch.tensor(0.4, dtype=D))

        def forward(self, u: Tensor) -> Tensor:
            c, s = torch.cos(self.angle), torch.sin(self.angle)
            return torch.stack([c * u[0] + s * u[1], s * u[0] - c * u[1]])

    step = Mirrored()
    A = al.recurrence(step, torch.zeros(2, dtype=D), steps=5, inverse=step)
    assert len(A.parts) == 2
    u, v = A.domain.randn(), A.codomain.randn()
    gradients = [
        torch.autograd.grad((made(u) * v).sum(), step.angle)[0]
        for made in (A, al.recurrence(step, torch.zeros(2, dtype=D), steps=5))
    ]
    torch.testing.assert_close(*gradients)


@dataclass
class Scaled:
    """A step that has no hash."""

    factor: float

    def __call__(self, u: Tensor) -> Tensor:
        return self.factor * u


def test_a_step_needs_no_hash() -> None:
    A = al.recurrence(Scaled(2.0), (2,), steps=3, inverse=Scaled(0.5))
    assert torch.equal(A.H(torch.ones(2)), 8 * torch.ones(2))
