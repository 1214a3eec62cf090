"""Random walks over changes and calls: an operator follows its module, which is called plainly beside it.

A walk is made from its number alone: `FUZZ_FIRST=n FUZZ_STEPS=1` walks number n again, to its end.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
import subjects
import torch
from built import affine, first_way, last_way, operator
from progress import shown
from subjects import SUBJECTS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
STEPS = int(os.environ.get("FUZZ_STEPS", "144"))
# Steps of a walk. It begins anew often enough: an operator that changes again and again is eager in the end.
LENGTH = int(os.environ.get("FUZZ_LENGTH", "40" if STEPS > 1000 else "8"))
IS_SHORT = LENGTH < 40
MANY = 70  # calls after which an operator has been worth its making
UNITS = 1e5  # of rounding, relative to the largest norm involved: what is stale differs by orders of magnitude more
MOST_REPORTED = 20


# Torch warns once in a process that makes sparse tensors.
pytestmark = [pytest.mark.filterwarnings(f"ignore:Sparse {what}") for what in ("CS[CR] tensor", "invariant checks")]
ON_MAPS = (subjects.Gathered, subjects.Sparse)


class WrongError(AssertionError):
    """The operator does not do as the module does."""


def leaves(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree)


def size(tree: Any) -> float:
    return math.hypot(*[float(t.detach().norm()) for t in leaves(tree)])


def compare(what: str, expected: Any, found: Any, *involved: Any) -> None:
    """Raise unless two trees are equal to rounding."""
    a, b = leaves(expected), leaves(found)
    shapes = [[(tuple(t.shape), t.dtype) for t in tree] for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise WrongError(f"{what} is {shapes[1]}, not {shapes[0]}")
    eps = max(torch.finfo(t.dtype).eps for t in a)
    scale = max(1.0, size(a), *map(size, involved))
    gap = size([s.detach() - t.detach() for s, t in zip(a, b, strict=True)])
    if not gap <= UNITS * eps * scale:
        raise WrongError(f"{what} is wrong by {gap:.3g}, of {size(a):.3g}; {UNITS * eps * scale:.3g} is allowed")


def spread(function: Callable[..., Any], x: Any) -> Any:
    return function(*x) if isinstance(x, tuple) else function(x)


class Walk:
    """An operator of a subject, and what has been done to it."""

    def __init__(self, number: int, kind: Any | None = None, engine: str | None = None) -> None:
        self.number, self.rng = number, random.Random(number)
        torch.manual_seed(number)
        subjects.GAIN, subjects.Global.gain, subjects.Global.gains = 1.5, 2.0, (1.0, 2.0)
        self.kind = kind or SUBJECTS[number % len(SUBJECTS)]
        self.dtype = self.rng.choice(self.kind.dtypes)
        self.engine = engine or self.rng.choice(("auto", "auto", "auto", "traced", "eager"))
        if self.kind.is_costly and IS_SHORT:
            self.engine = "eager"
        self.subject = self.kind(self.rng, self.dtype)
        self.done: deque[str] = deque(maxlen=10)
        self.counts: Counter[str] = Counter()
        self.witness: tuple[Any, ...] | None = None
        domain, options = self.subject.example(self.dtype), {"batch_dims": self.kind.batch_dims, "engine": self.engine}
        # Which kernel is fast is measured, and takes long.
        options["lowering"] = self.rng.random() < 0.5 and (not IS_SHORT or self.kind in ON_MAPS)
        if self.kind in ON_MAPS and options["lowering"] and number % 3:  # small ones have none of themselves
            options["choose_map"] = (first_way, last_way)[number % 2]
        function = self.subject.function if isinstance(self.subject, subjects.Closure) else self.subject
        make = affine if self.kind.affine else operator
        self.operator: Any = make(function, domain, None, requested=options.pop("engine"), **options)
        self.derived()

    def __str__(self) -> str:
        return (
            f"walk {self.number} of {self.kind.__name__} in {self.dtype}, engine={self.engine!r}, after "
            f"{sum(self.counts.values())} steps: … {'; '.join(self.done)}\n    replay with FUZZ_FIRST={self.number} "
            f"FUZZ_STEPS=1 FUZZ_LENGTH={LENGTH}"
        )

    def derived(self) -> None:
        """Make what is made of the operator, and is to follow it."""
        self.A: al.LinearOperator = self.operator.linear if self.kind.affine else self.operator
        self.sum = 2 * self.A - self.A
        self.product = self.A.gram
        self.kept = al.LeastSquares(self.operator, self.A.codomain.randn(torch.Generator().manual_seed(self.number)))

    # -- the reference -----------------------------------------------------------------------------------------------

    def plain(self, x: Any) -> Any:
        return spread(self.subject, x)

    def linear(self, x: Any) -> Any:
        """Return `f(x) − f(0)`."""
        if not self.kind.affine:
            return self.plain(x)
        return pytree.tree_map(torch.sub, self.plain(x), self.plain(pytree.tree_map(torch.zeros_like, x)))

    def back(self, v: Any, like: Any, *, create_graph: bool = False) -> Any:
        """Return the vector-Jacobian product of the module."""
        at, structure = pytree.tree_flatten(like)
        at = [torch.zeros_like(t).requires_grad_() for t in at]
        with torch.enable_grad():
            out = self.plain(pytree.tree_unflatten(at, structure))
            found = torch.autograd.grad(out, at, v, create_graph=create_graph, materialize_grads=True)
        return pytree.tree_unflatten(list(found), structure)

    def parameters(self) -> list[Tensor]:
        found = {id(p): p for p in self.subject.parameters() if p.requires_grad}
        return list(found.values())

    def batch(self) -> tuple[int, ...]:
        if not self.kind.batch_dims:
            return ()
        return (self.rng.choice((1, 2, 2, 3, 3, 3 if IS_SHORT else 4, 2 if IS_SHORT else self.rng.randint(5, 24))),)

    def draw(self, space: al.Space, batch: tuple[int, ...]) -> Any:
        space = space.with_batch(batch) if batch else space
        return space.randn(torch.Generator().manual_seed(self.rng.getrandbits(32)))

    def pair(self) -> tuple[Any, Any]:
        batch = self.batch()
        return self.draw(self.A.domain, batch), self.draw(self.A.codomain, batch)

    # -- calls -------------------------------------------------------------------------------------------------------

    def call_forward(self) -> None:
        x, _ = self.pair()
        compare("A(x)", self.plain(x), self.operator(x), x)
        compare("A.linear(x)", self.linear(x), self.A(x), x)

    def call_adjoint(self) -> None:
        x, y = self.pair()
        compare("A.H(y)", self.back(y, x), self.operator.H(y), y)

    def call_without_gradients(self) -> None:
        x, y = self.pair()
        with torch.inference_mode() if self.rng.random() < 0.3 else torch.no_grad():
            compare("A(x) without gradients", self.plain(x), self.operator(x), x)
            found = self.operator.H(y)
        compare("A.H(y) without gradients", self.back(y, x), found, y)

    def call_gram(self) -> None:
        x, _ = self.pair()
        inside = self.linear(x)
        expected = self.back(inside, x)
        compare("A.gram(x)", expected, self.A.gram(x), x, inside)
        if not self.kind.batch_dims:
            compare("the kept A.gram(x)", expected, self.product(x), x, inside)

    def call_algebra(self) -> None:
        x, y = self.pair()
        compare("(2A − A)(x)", self.linear(x), self.sum(x), x)
        compare("(2A − A).H(y)", self.back(y, x), self.sum.H(y), y)

    def call_transpose(self) -> None:
        x, y = self.pair()
        conjugated = pytree.tree_map(torch.conj_physical, y)
        expected = pytree.tree_map(torch.conj_physical, self.back(conjugated, x))
        compare("A.T(y)", expected, self.A.T(y), y)

    def gradients(self, function: Callable[[Any], Any], target: Any, at: Any) -> list[Tensor]:
        """Return the gradients of `½‖f(x) − t‖²` with respect to x and the parameters."""
        at, structure = pytree.tree_flatten(at)
        at = [t.clone().requires_grad_() for t in at]
        with torch.enable_grad():
            out = function(pytree.tree_unflatten(at, structure))
            loss = sum((s - t).abs().square().sum() / 2 for s, t in zip(leaves(out), leaves(target), strict=True))
            return list(torch.autograd.grad(loss, [*at, *self.parameters()], materialize_grads=True))

    def call_gradient_through_forward(self) -> None:
        x, y = self.pair()
        expected = self.gradients(self.plain, y, x)
        compare("the gradient through A", expected, self.gradients(self.operator, y, x), x, y)

    def call_gradient_through_adjoint(self) -> None:
        x, y = self.pair()
        expected = self.gradients(lambda v: self.back(v, x, create_graph=True), x, y)
        compare("the gradient through A.H", expected, self.gradients(self.operator.H, x, y), x, y)

    def call_forward_backward(self) -> None:
        """Take the gradient of a gradient step, as a network that unrolls iterations does."""
        x, y = self.pair()

        def plainly(z: Any) -> Any:
            residual = pytree.tree_map(torch.sub, self.plain(z), y)
            return self.back(residual, x, create_graph=True)

        def derived(z: Any) -> Any:
            return self.operator.H(pytree.tree_map(torch.sub, self.operator(z), y))

        compare(
            "the gradient through A.H(A(x) − y)", self.gradients(plainly, x, x), self.gradients(derived, x, x), x, y
        )

    def least_squares(self, what: str, objective: al.LeastSquares, x: Any, y: Any) -> None:
        residual = pytree.tree_map(lambda s, t: (s - t).detach(), self.plain(x), y)
        value, expected = size(residual) ** 2 / 2, self.back(residual, x)
        compare(f"{what}.gradient(x)", expected, objective.gradient(x), x, residual)
        value_found, found = objective.value_and_gradient(x)
        compare(f"{what}.value_and_gradient(x)", expected, found, x, residual)
        for number in (value_found, objective(x)):
            compare(f"{what}(x)", torch.tensor(value, dtype=number.dtype), number, x, residual)

    def call_least_squares(self) -> None:
        x, y = self.pair()
        self.least_squares("F", al.LeastSquares(self.operator, y), x, y)

    def call_kept_least_squares(self) -> None:
        x = self.draw(self.A.domain, self.A.domain.batch_shape)
        self.least_squares("the kept F", self.kept, x, self.kept.y)

    def call_often(self) -> None:
        x, y = self.pair()
        expected, back = self.plain(x), self.back(y, x)
        with torch.no_grad():
            for _ in range(MANY):
                found, found_back = self.operator(x), self.operator.H(y)
        compare(f"A(x), call {MANY}", expected, found, x)
        compare(f"A.H(y), call {MANY}", back, found_back, y)

    def call_frozen(self) -> None:
        x, y = self.pair()
        with self.A.frozen():
            for _ in range(2):
                compare("A(x), frozen,", self.plain(x), self.operator(x), x)
                compare("A.H(y), frozen,", self.back(y, x), self.operator.H(y), y)
                compare(
                    "the gradient, frozen,", self.gradients(self.plain, y, x), self.gradients(self.operator, y, x), x, y
                )

    def call_transform(self) -> None:
        x, y = self.pair()
        out, back = torch.func.vjp(self.operator, x)
        compare("vjp of A", self.plain(x), out, x)
        compare("vjp of A", self.back(y, x), back(y)[0], y)

    def call_account(self) -> None:
        assert self.operator.engine in {"eager", "traced"}
        assert self.operator.explain()
        assert self.A.H.H is self.A
        if not self.kind.shares:
            held = [{id(t) for t in (*m.parameters(), *m.buffers())} for m in (self.operator, self.A.H, self.subject)]
            if held[0] != held[2] or held[1] != held[2]:
                raise WrongError("the operator does not hold the parameters and buffers that the module holds")

    # -- changes -----------------------------------------------------------------------------------------------------

    def own_change(self) -> str | None:
        found = self.subject.changes(self.rng)
        with torch.no_grad():
            return self.rng.choice(found)() if found else None

    def change_own(self) -> str | None:
        return self.own_change()

    def change_own_again(self) -> str | None:
        return self.own_change()

    def held(self, *, buffers: bool) -> list[tuple[nn.Module, str, Tensor]]:
        """Return the modules that hold parameters, or buffers, with their names."""
        if not isinstance(self.subject, nn.Module):
            return []
        return [
            (module, name, tensor)
            for module in self.subject.modules()
            for name, tensor in (module._buffers if buffers else module._parameters).items()
            if tensor is not None and (not buffers or name not in self.kind.fixed)
        ]

    def like(self, tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape) > 0.4 if tensor.dtype == torch.bool else torch.randn_like(tensor.detach())

    def change_in_place(self, *, buffers: bool = False) -> str | None:
        held = self.held(buffers=buffers)
        if not held:
            return None
        _, name, tensor = self.rng.choice(held)
        how, new = self.rng.choice(("copy_", "data", "data.copy_", "set")), self.like(tensor)
        with torch.no_grad():
            if how == "copy_":
                tensor.copy_(new)
            elif how == "data":
                tensor.data = new
            elif how == "data.copy_":
                tensor.data.copy_(new)
            else:
                tensor[...] = new
        return f"{name} in place by {how}"

    def change_buffer_in_place(self) -> str | None:
        return self.change_in_place(buffers=True)

    def change_parameter(self) -> str | None:
        held = self.held(buffers=False)
        if not held:
            return None
        module, name, tensor = self.rng.choice(held)
        setattr(module, name, nn.Parameter(self.like(tensor), requires_grad=tensor.requires_grad))
        return f"{name} is another parameter"

    def change_buffer(self) -> str | None:
        held = self.held(buffers=True)
        if not held:
            return None
        module, name, tensor = self.rng.choice(held)
        setattr(module, name, self.like(tensor))
        return f"{name} is another buffer"

    def change_requires_grad(self) -> str | None:
        held = self.held(buffers=False)
        if not held:
            return None
        _, name, tensor = self.rng.choice(held)
        if self.rng.random() < 0.2:
            self.operator.requires_grad_(not tensor.requires_grad)
            return f"requires_grad of all is {tensor.requires_grad}"
        tensor.requires_grad_(not tensor.requires_grad)
        return f"requires_grad of {name} is {tensor.requires_grad}"

    def change_by_optimizer(self) -> str | None:
        parameters = self.parameters()
        if not parameters or not self.subject.is_linear():
            return None
        kind = self.rng.choice((torch.optim.SGD, torch.optim.Adam))
        optimizer = kind(parameters, lr=1e-2)
        x, y = self.pair()
        gradients = self.gradients(self.operator, y, x)[len(leaves(x)) :]
        norm = max(1.0, size(gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / norm
        optimizer.step()
        optimizer.zero_grad()
        return f"a step of {kind.__name__}"

    def change_state_dict(self) -> str | None:
        if not self.held(buffers=False):
            return None
        saved = {name: tensor.clone() for name, tensor in self.operator.state_dict().items()}
        self.change_in_place()
        assign = self.rng.random() < 0.3
        self.operator.load_state_dict(saved, assign=assign)
        for name, tensor in self.operator.state_dict().items():
            if not torch.equal(tensor.to_dense(), saved[name].to_dense()):
                raise WrongError(f"{name} was not restored by load_state_dict")
        return f"state_dict there and back, assign={assign}"

    def change_dtype(self) -> str | None:
        if not isinstance(self.subject, nn.Module) or torch.float64 not in {d.to_real() for d in self.kind.dtypes}:
            return None
        now = self.A.domain.specs[0].dtype
        narrow, wide = (torch.complex64, torch.complex128) if now.is_complex else (torch.float32, torch.float64)
        new = wide if now is narrow else narrow
        if not self.subject.is_linear():
            return None
        mover = self.rng.choice((self.operator, self.operator, self.A.H))
        mover.to(new)
        self.witness = None
        self.derived()
        return f"{'A.H' if mover is self.A.H else 'A'}.to({new})"

    def change_copy(self) -> str | None:
        if self.kind.shares or not self.subject.is_linear():
            return None
        by_pickle = self.kind.is_picklable and (self.rng.random() < 0.3 or not self.subject.is_copyable)
        before = self.operator
        x, y = self.pair()
        self.witness = before, x, y, before(x), before.H(y)
        self.operator = pickle.loads(pickle.dumps(before)) if by_pickle else copy.deepcopy(before)
        self.derived()
        if self.rng.random() < 0.3:  # the other way round: the original changes
            self.witness = None
            with torch.no_grad():
                for parameter in before.parameters():
                    parameter.zero_()
            if isinstance(self.subject, (subjects.Attributes, subjects.Branching)):
                self.subject.numbers[0:1] = [1e3]
                self.subject.scale = 1e3
        self.subject = self.A.module
        self.call_forward()
        return "a copy by pickle" if by_pickle else "a deep copy"

    def change_refresh(self) -> str | None:
        if not self.subject.is_linear():
            return None
        self.A.refresh()
        return "refresh()"

    def change_mode(self) -> str | None:
        """Set the mode of the operator, which is that of the subject where dropout is not."""
        if self.kind in {subjects.Normed, subjects.Dropped} or not isinstance(self.subject, nn.Module):
            return None
        self.operator.train(self.rng.random() < 0.5)
        return f"A.train({self.operator.training})"

    # -- the walk ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        calls = [name for name in dir(self) if name.startswith("call_")]
        changes = [name for name in dir(self) if name.startswith("change_")]
        if self.rng.random() < 0.5:
            name = self.rng.choice(changes)
            self.done.append(name)
            told = getattr(self, name)()
            if told is None:
                self.done.pop()
                return self.step()
            self.done[-1] = told
        else:
            name = self.rng.choice(calls)
            self.done.append(name.removeprefix("call_").replace("_", " "))
            if self.subject.is_linear() or name == "call_account":
                getattr(self, name)()
            else:
                self.require_refusal()
        self.counts[name] += 1
        if self.witness is not None:
            operator, x, y, out, back = self.witness
            compare("A(x) of the original of a copy", out, operator(x), x)
            compare("A.H(y) of the original of a copy", back, operator.H(y), y)
        return None

    def require_refusal(self) -> None:
        x, y = self.pair()
        for what, function, argument in (("A(x)", self.operator, x), ("A.H(y)", self.operator.H, y)):
            try:
                function(argument)
            except al.NotLinearError:
                continue
            raise WrongError(f"{what} of a map that is not linear any more is not refused")


def walked(number: int, length: int, counts: Counter[str]) -> str | None:
    """Walk, and return what went wrong."""
    walk = None
    try:
        walk = Walk(number)
        for _ in range(length):
            walk.step()
    except Exception as error:
        return f"{walk or f'walk {number}'}\n    {type(error).__name__}: {error}"
    finally:
        if walk is not None:
            counts.update(walk.counts)
    return None


@pytest.mark.slow
def test_operators_follow_their_modules():
    counts: Counter[str] = Counter()
    failures = []
    for number in shown(range(FIRST, FIRST + max(1, STEPS // LENGTH)), f"walks of {LENGTH} steps"):
        failure = walked(number, LENGTH, counts)
        if failure:
            failures.append(failure)
            print(failure, flush=True)
    assert not failures, "\n".join([f"{len(failures)} walks failed:", *failures[:MOST_REPORTED]])
    if FIRST == 0 and STEPS >= 144:
        assert not {name for name in dir(Walk) if name.startswith(("call_", "change_"))} - counts.keys()


@pytest.mark.parametrize("kind", SUBJECTS, ids=lambda kind: kind.__name__)
def test_subjects_are_what_they_say(kind):
    """Every subject is linear, or affine, at first."""
    walk = Walk(0, kind, "eager")
    x, z = walk.draw(walk.A.domain, ()), walk.draw(walk.A.domain, ())
    combined = pytree.tree_map(lambda s, t: 3 * s - t, walk.linear(x), walk.linear(z))
    compare("f(3x − z)", combined, walk.linear(pytree.tree_map(lambda s, t: 3 * s - t, x, z)), x)


def test_a_stale_operator_is_reported():
    """An operator that does not look again is wrong after a change."""
    walk = Walk(2, subjects.Attributes, "traced")
    with walk.A.frozen():
        walk.call_forward()
        walk.subject.scale = 7.0
        for call in (walk.call_forward, walk.call_adjoint, walk.call_gram, walk.call_least_squares):
            with pytest.raises(WrongError, match="is wrong by"):
                call()
    walk.call_forward()


def test_a_map_that_is_not_refused_is_reported():
    walk = Walk(2, subjects.Attributes, "eager")
    walk.subject.shift = 1.0
    walk.require_refusal()
    walk.subject.shift = 0
    with pytest.raises(WrongError, match="is not refused"):
        walk.require_refusal()


def test_a_failure_says_how_to_walk_again(monkeypatch):
    monkeypatch.setattr(Walk, "plain", lambda self, x: 1.001 * self.subject(x))
    failure = walked(11, 20, Counter())
    assert "walk 11 of Branching" in failure
    assert "steps: … " in failure
    assert f"FUZZ_FIRST=11 FUZZ_STEPS=1 FUZZ_LENGTH={LENGTH}" in failure
    assert "is wrong by" in failure


def test_a_walk_is_the_same_each_time():
    first, second = Walk(11), Walk(11)
    for walk in (first, second):
        for _ in range(6):
            walk.step()
    assert str(first) == str(second)
