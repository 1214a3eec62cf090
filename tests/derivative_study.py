"""How ``check_derivative`` does: wrong backwards that it finds, and right ones that it calls wrong.

``python -m tests.derivative_study 10000`` draws as many points for right backwards, and prints what failed, and the
table for docs/verification_power.md.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.verify.derivative import check_jacobian
from tests.nonlinear_zoo import ZOO, Case

Tensors = tuple[Tensor, ...]
Pull = Callable[[Tensors], Tensors]
Mistake = Callable[[Callable[..., Tensors], Tensors, Tensors], Tensors]  # (leaves of f, x, v) → what backward returns


def pulled(f: Callable[..., Tensors], x: Tensors, v: Tensors) -> Tensors:
    """Return what a right backward does."""
    return tuple(torch.func.vjp(f, *x)[1](v))


def _half(t: Tensor, of: float) -> Tensor:
    """Return a tensor whose second half is multiplied, or all of it where it is one number."""
    weight = torch.ones(t.numel(), dtype=t.dtype)
    weight[t.numel() // 2 :] = of
    return t * weight.reshape(t.shape)


def _one(t: Tensor, of: float) -> Tensor:
    """Return a tensor whose middle entry is multiplied."""
    weight = torch.ones(t.numel(), dtype=t.dtype)
    weight[t.numel() // 2] = of
    return t * weight.reshape(t.shape)


def _transposed(f: Callable[..., Tensors], x: Tensors, v: Tensors) -> Tensors:
    outputs, back = torch.func.vjp(f, *x)
    (found,) = torch.func.vjp(lambda *u: tuple(back(u)), *map(torch.zeros_like, outputs))[1:]
    return tuple(found(v))


def _shifted(f: Callable[..., Tensors], x: Tensors, v: Tensors) -> Tensors:
    return pulled(f, tuple(0.9 * t for t in x), v)


def _extra(f: Callable[..., Tensors], x: Tensors, v: Tensors) -> Tensors:
    total = sum(t.real.sum() for t in v)
    return tuple(g + 0.1 * total for g in pulled(f, x, v))


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda leaves: (change(leaves[0]), *leaves[1:])


def _last(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda leaves: (*leaves[:-1], change(leaves[-1]))


def _after(change: Callable[[Tensors], Tensors]) -> Mistake:
    return lambda f, x, v: change(pulled(f, x, v))


def _before(change: Callable[[Tensors], Tensors]) -> Mistake:
    return lambda f, x, v: pulled(f, x, change(v))


MISTAKES: dict[str, Mistake] = {
    "factor 2": _after(lambda g: tuple(2 * t for t in g)),
    "factor 1.01": _after(lambda g: tuple(1.01 * t for t in g)),
    "sign": _after(lambda g: tuple(-t for t in g)),
    "sign of a part": _after(_last(lambda t: _half(t, -1.0))),
    "detached": _after(lambda g: tuple(0 * t for t in g)),
    "detached leaf": _after(_last(lambda t: 0 * t)),
    "detached part": _after(_first(lambda t: _half(t, 0.0))),
    "missing term": _before(_last(lambda t: _half(t, 0.0))),
    "wrong row": _before(_first(lambda t: _one(t, 1.5))),
    "missing row": _before(_last(lambda t: _one(t, 0.0))),
    "wrong column": _after(_first(lambda t: _one(t, 1.1))),
    "rows in another order": _before(_first(lambda t: t.roll(1))),
    "transposed": _transposed,
    "conjugated": _after(lambda g: tuple(t.conj() for t in g)),
    "cotangent conjugated": _before(lambda v: tuple(t.conj() for t in v)),
    "at another point": _shifted,
    "extra term": _extra,
}


def function_with(case: Case, mistake: Mistake) -> Callable[..., Any]:
    """Return the map of a case with a backward of its own, which has a mistake."""

    def function(*args: Any) -> Any:
        x, shape = pytree.tree_flatten(args)
        structure: list[Any] = []

        def f(*leaves: Tensor) -> Tensors:
            found, out = pytree.tree_flatten(case.function(*pytree.tree_unflatten(leaves, shape)))
            structure[:] = [out]
            return tuple(found)

        class Written(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *leaves: Tensor) -> Any:
                ctx.save_for_backward(*leaves)
                with torch.no_grad():
                    return f(*leaves)

            @staticmethod
            def backward(ctx: Any, *v: Tensor) -> Any:
                return mistake(f, ctx.saved_tensors, v)

        return pytree.tree_unflatten(Written.apply(*x), structure[0])

    return function


def is_mistaken(case: Case, mistake: Mistake, x: Any) -> bool:
    """Return whether a mistake changes the backward at a point, and gives a cotangent of the right shape."""
    args = x if type(x) is tuple else (x,)
    leaves, shape = pytree.tree_flatten(args)

    def f(*parts: Tensor) -> Tensors:
        return tuple(pytree.tree_leaves(case.function(*pytree.tree_unflatten(parts, shape))))

    draw = torch.Generator().manual_seed(5)
    v = tuple(torch.randn(t.shape, dtype=t.dtype, generator=draw) for t in f(*leaves))
    if mistake is _transposed and [(t.shape, t.dtype) for t in v] != [(t.shape, t.dtype) for t in leaves]:
        return False
    right, found = pulled(f, tuple(leaves), v), mistake(f, tuple(leaves), v)
    eps = max(torch.finfo(t.dtype).eps for t in leaves)
    return any(bool((a - b).abs().max() > eps**0.5 * a.abs().max()) for a, b in zip(right, found, strict=True))


def single(case: Case) -> Case:
    """Return a case in single precision."""
    narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    wide = {small: large for large, small in narrow.items()}
    if isinstance(case.function, nn.Module):
        return case._replace(function=copy.deepcopy(case.function).float(), dtype=narrow[case.dtype])

    def narrowed(*args: Any) -> Any:
        return pytree.tree_map(lambda t: t.to(narrow.get(t.dtype, t.dtype)), case.function(*args))

    def widened(*args: Any) -> Any:
        return narrowed(*pytree.tree_map(lambda t: t.to(wide[t.dtype]), args))

    found = case._replace(function=narrowed, dtype=narrow[case.dtype])
    x = found.point()
    try:
        narrowed(*x) if type(x) is tuple else narrowed(x)
    except RuntimeError:  # constants are in double precision
        return found._replace(function=widened)
    return found


def injected(names: Any = ZOO, of: Callable[[Case], Case] = lambda case: case) -> Iterator[tuple[str, str, str]]:
    """Yield map, mistake and diagnosis for each wrong backward; the diagnosis is empty where it was not found."""
    for name in names:
        case = of(ZOO[name])
        x = case.point()
        for kind, mistake in MISTAKES.items():
            if is_mistaken(case, mistake, x):
                try:
                    report = al.check_derivative(function_with(case, mistake), x)
                except al.NotDifferentiableError as error:
                    yield name, kind, f"refused: {error}"
                else:
                    yield name, kind, report.diagnosis


def false_alarms(count: int, names: Any = ZOO) -> Iterator[tuple[str, str, int, str]]:
    """Yield map, dtype, seed and diagnosis for each alarm of right backwards, at random points of several sizes."""
    cases = [(name, of(ZOO[name])) for name in names for of in (lambda case: case, single)]
    rounds = -(-count // len(cases))
    for name, case in cases:
        J = al.jacobian(case.function, case.point())
        for seed in range(rounds):
            size = (1.0, 0.1, 3.0)[seed % 3]
            x = pytree.tree_map(lambda t, size=size: t * size, case.point(seed))
            report = check_jacobian(J.at(x), seed)
            if not report.passed:
                yield name, str(case.dtype), seed, report.details()


if __name__ == "__main__":
    names = sys.argv[2:] or ZOO
    alarms = [" ".join(map(str, alarm)) for alarm in false_alarms(int(sys.argv[1]), names)]
    lines, table = [f"{len(alarms)} false alarms", *alarms], [Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()]
    for seen, precision in zip(table, (lambda case: case, single), strict=True):
        for name, kind, diagnosis in injected(names, precision):
            seen[kind, bool(diagnosis)] += 1
            lines += [] if diagnosis else [f"not found: {kind} in {name}"]
    for kind in MISTAKES:
        found = [(seen[kind, True], seen[kind, True] + seen[kind, False]) for seen in table]
        lines.append(f"| {kind} | {' | '.join(f'{100 * k / max(n, 1):.1f} % of {n}' for k, n in found)} |")
    sys.stdout.write("\n".join(lines) + "\n")
