"""Grams ``AᴴA`` and ``AᴴWA`` from one simplified graph, where A is derived, or made of operators that are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from adjointlab import compat
from adjointlab.space.algebra import conjugated
from adjointlab.transpose import Transposition

Operator = Any  # a LinearOperator, which is made of what is here


@dataclass(frozen=True)
class Whole:
    """The derivation of an operator that is made of others, if there is one, and how often these were made then."""

    transposition: Transposition | None
    side: int  # which of A and Aᴴ it is of
    sources: list[Transposition]
    made: list[int]


def as_gram(operator: Operator, a: Operator, weight: Callable[[], Any] | None = None) -> None:
    """Have ``AᴴA``, or ``AᴴWA`` with the entries of a real diagonal W, computed from one graph where that is equal."""

    def fused(maps: Callable[[Any], Any], entries: Callable[[], Any]) -> Callable[[Any], Any]:
        def function(x: Any) -> Any:
            found = _at(a, x, entries())
            return maps(x) if found is None else found

        return function

    def nothing() -> None:
        return None

    forth, back = (nothing, nothing) if weight is None else (weight, lambda: conjugated(weight()))
    first, second = operator._body.functions
    operator._body.functions = fused(first, forth), fused(second, back)
    operator._body.root = a, weight is not None


def _at(a: Operator, x: Any, weight: Any) -> Any:
    """Return ``AᴴA x``, or ``Aᴴ w ⊙ A x``, from one simplified graph; None where A and Aᴴ are to run."""
    if not compat.plain() or compat.differentiated(a.domain.leaves(x)):
        return None
    is_new = a._body.source is None and a._body.whole is None
    source = None if is_new and compat.differentiated(tuple(a.parameters())) else as_one(a)
    return None if source is None else source.gram(x, weight, swapped=_is_swapped(a))


def as_one(a: Operator) -> Transposition | None:
    """Return the derivation of A, or one of A as a whole where it is made of derived operators; None elsewhere."""
    body = a._body
    if body.source is not None:
        return body.source  # type: ignore[no-any-return]
    if body.whole is not None and body.whole.made == [source.made for source in body.whole.sources]:
        return body.whole.transposition  # type: ignore[no-any-return]
    leaves = [part for part in a.modules() if getattr(part, "derived_operator", False) and not part.parts]
    known = [part.source.options for part in leaves if part.source]
    traced = all(p.engine == "traced" if p.source else p._body.notation is not None for p in leaves)
    is_one = traced and bool(known) and not (a.domain.is_sharded or a.codomain.is_sharded)
    spread = isinstance(a.domain.unflatten(a.domain.specs), tuple)  # over the arguments of a function
    whole = (lambda *x: a(x)) if spread else a
    sources, found = [part.source for part in leaves if part.source], None
    if is_one:
        lowering, tol = all(o.lowering for o in known), max((o.tol for o in known if o.tol is not None), default=None)
        options = replace(known[0], requested="auto", affine=False, derivative="autograd", lowering=lowering, tol=tol)
        found = Transposition(whole, a.domain, None, replace(options, check=True, for_gram=True), codomain=a.codomain)
    body.whole = Whole(found, a._side, sources, [source.made for source in sources])
    return found


def simplified(operator: Operator) -> list[str]:
    """Return a line on what is simplified in a gram; nothing for any other operator."""
    if operator._body.root is None:
        return []
    a, weighted = operator._body.root
    source = as_one(a)
    said = () if source is None else source.gram_simplified(swapped=_is_swapped(a), weighted=weighted)
    return [f"one graph: {', '.join(said)}" if said else "nothing to simplify: one map runs after the other"]


def _is_swapped(a: Operator) -> bool:
    """Return whether the derivation is that of Aᴴ."""
    body = a._body
    return bool(a._side != (0 if body.source is not None or body.whole is None else body.whole.side))
