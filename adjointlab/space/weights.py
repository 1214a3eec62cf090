"""Weights of inner products: ``⟨a, b⟩_W = ⟨a, Wb⟩``, where W is positive numbers, or an operator with its inverse."""

from __future__ import annotations

import contextlib
import copy
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adjointlab.errors import SpaceMismatchError

if TYPE_CHECKING:
    from adjointlab.space.space import Space
    from adjointlab.space.spec import TensorSpec

Leaves = Sequence[Tensor]
Map = Callable[[Any], Any]

_DOUBLE = {True: torch.complex128, False: torch.float64}
_UNITS = 64.0  # of rounding, in the test of an operator and its inverse
_KINDS = (
    "give a positive number, a real tensor for each leaf that broadcasts to its dimensions (without free ones), or a "
    "pair of functions (W, W_inverse)"
)


@dataclass(frozen=True, eq=False)
class Entries:
    """``x ↦ w ⊙ x`` on one leaf: positive numbers that broadcast to its dimensions."""

    values: Tensor
    count = 1

    def times(self, leaves: Leaves, wide: bool) -> list[Tensor]:
        """Return ``w ⊙ x``, in double precision if asked for."""
        leaf = leaves[0].to(_DOUBLE[leaves[0].is_complex()]) if wide else leaves[0]
        return [self.values * leaf]

    def divided(self, leaves: Leaves) -> list[Tensor]:
        """Return ``x / w``."""
        return [leaves[0] / self.values]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entries):
            return NotImplemented
        a, b = self.values, other.values
        return a is b or (a.device == b.device and torch.equal(*torch.broadcast_tensors(a, b)))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = self.values
        return f"{float(values):g}" if values.numel() == 1 else f"<{tuple(values.shape)} entries>"


@dataclass(frozen=True, eq=False)
class Pair:
    """``x ↦ Wx`` with its inverse, on elements of a space without a weight."""

    function: Map
    inverse: Map
    space: Space

    @property
    def count(self) -> int:
        """Number of leaves."""
        return len(self.space.specs)

    def times(self, leaves: Leaves, wide: bool) -> list[Tensor]:
        """Return ``Wx``, in the precision of x."""
        return list(self.space.leaves(self.function(self.space.unflatten(leaves)), "Wx"))

    def divided(self, leaves: Leaves) -> list[Tensor]:
        """Return ``W⁻¹x``."""
        return list(self.space.leaves(self.inverse(self.space.unflatten(leaves)), "W⁻¹x"))

    def __eq__(self, other: object) -> bool:
        """Return whether both are of the same functions, or, as copies are, equal on a random element."""
        if not isinstance(other, Pair) or self.space != other.space:
            return NotImplemented if not isinstance(other, Pair) else False
        if self.function is other.function:
            return True
        with torch.no_grad():
            x = self.space.leaves(self.space.randn(torch.Generator().manual_seed(0)))
            same = all(map(torch.equal, self.times(x, False), other.times(x, False)))
        return self.space.every(same)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.function).__name__} with its inverse>"


Part = Entries | Pair


@dataclass(frozen=True)
class Weight:
    """``W`` of ``⟨a, b⟩_W = ⟨a, Wb⟩``: self-adjoint and positive; one part for one leaf, or for several."""

    parts: tuple[Part, ...]

    def times(self, leaves: Leaves, *, wide: bool = False) -> list[Tensor]:
        """Return the leaves of ``Wx``; ``wide`` computes products with entries in double precision."""
        return [leaf for part, own in self._split(leaves) for leaf in part.times(own, wide)]

    def divided(self, leaves: Leaves) -> list[Tensor]:
        """Return the leaves of ``W⁻¹x``."""
        return [leaf for part, own in self._split(leaves) for leaf in part.divided(own)]

    @property
    def is_diagonal(self) -> bool:
        """Whether W multiplies entry by entry."""
        return all(isinstance(part, Entries) for part in self.parts)

    @property
    def entries(self) -> list[Tensor]:
        """The numbers that W multiplies by, where it multiplies entry by entry."""
        return [part.values for part in self.parts if isinstance(part, Entries)]

    def require(self, space: Space) -> None:
        """Raise unless the weight fits a space, whose free dimensions it must not depend on."""
        k = space.batch_dims
        for part, specs in self._split(space.specs):
            if isinstance(part, Pair):
                fits = part.space.batch_dims >= k
            else:
                fits = _broadcasts(part.values.shape, specs[0].shape[k:])
            if not fits:
                raise SpaceMismatchError(
                    f"expected a weight that does not depend on the {k} free dimensions of {[s.shape for s in specs]}, "
                    f"got {part}: lower batch_dims, or give a weight for the other dimensions"
                )

    def moved(
        self, function: Callable[[Tensor], Tensor], specs: Sequence[TensorSpec], moved: Callable[[Space, Any], Space]
    ) -> Weight:
        """Return the weight where a conversion of tensors has made the given specs of the leaves."""
        parts: list[Part] = []
        for part, own in self._split(specs):
            if isinstance(part, Entries):
                parts.append(_entries(part.values, own[0]))
            elif tuple(own) == part.space.specs:
                parts.append(part)
            else:
                parts.append(_moved_pair(part, function, moved(part.space, function)))
        return Weight(tuple(parts))

    def _split(self, items: Sequence[Any]) -> Iterator[tuple[Part, Sequence[Any]]]:
        start = 0
        for part in self.parts:
            yield part, items[start : start + part.count]
            start += part.count

    def __repr__(self) -> str:
        return repr(self.parts[0]) if len(self.parts) == 1 else f"({', '.join(map(repr, self.parts))})"


def joined(weights: Sequence[tuple[Weight | None, int]], specs: Sequence[TensorSpec]) -> Weight | None:
    """Return the weight of a product of spaces, given theirs and how many leaves each has; None where all have none."""
    if all(weight is None for weight, _ in weights):
        return None
    parts: list[Part] = []
    start = 0
    for weight, count in weights:
        own, start = specs[start : start + count], start + count
        ones = [Entries(torch.ones((), dtype=spec.dtype.to_real(), device=spec.device)) for spec in own]
        parts += ones if weight is None else weight.parts
    return Weight(tuple(parts))


def weight_of(space: Space, given: Any) -> Weight | None:
    """Return the weight that numbers, tensors, or an operator with its inverse are for a space; None for ones."""
    if isinstance(given, Weight):
        given.require(space)
        return given
    if isinstance(given, tuple) and len(given) == 2 and all(callable(f) and not isinstance(f, Tensor) for f in given):
        return Weight((_pair(space, *given),))
    is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    is_number = is_number or (isinstance(given, Tensor) and not given.ndim)
    flat = [given] * len(space.specs) if is_number else _flat(space, given)
    parts, reason = [], ""
    try:
        k = space.batch_dims
        for value, spec in zip(flat, space.specs, strict=True):
            parts.append(_entries(_read(value, tuple(spec.shape[k:])), spec))
    except SpaceMismatchError as error:
        reason = str(error)
    if not space.every(not reason):
        raise SpaceMismatchError(reason or "expected a positive weight on every process, got none on another one")
    _require_alike(space, parts)
    is_one = space.every(all(bool((part.values == 1).all()) for part in parts))
    return None if is_one else Weight(tuple(parts))


def _flat(space: Space, given: Any) -> list[Any]:
    if callable(given) and not isinstance(given, Tensor):
        raise SpaceMismatchError(
            f"expected the inverse beside the operator {type(given).__name__} as a weight: {_KINDS}"
        )
    flat = space.structure.leaves(given)
    if flat is None or len(flat) != len(space.specs):
        raise SpaceMismatchError(f"expected a weight for each leaf of {space}, got {type(given).__name__}: {_KINDS}")
    return flat


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(own in {1, size} for own, size in pairs)


def _read(value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of one leaf as real numbers that broadcast to its dimensions, or raise."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.layout is not torch.strided:
        raise SpaceMismatchError(f"expected a weight of positive real numbers, got {type(value).__name__}: {_KINDS}")
    if value.is_complex():
        raise SpaceMismatchError(f"expected a weight of real numbers, got {value.dtype}: pass its .real or .abs()")
    kept = tuple(value.shape)
    while kept and kept[0] == 1:
        kept = kept[1:]
    if not _broadcasts(kept, shape):
        raise SpaceMismatchError(
            f"expected a weight that broadcasts to {shape}, got the shape {tuple(value.shape)}: reshape it (free "
            "dimensions have no weight)"
        )
    return value.reshape(kept)


def _entries(value: Tensor, spec: TensorSpec) -> Entries:
    found = value.detach().to(device=spec.device, dtype=spec.dtype.to_real(), copy=True)
    if not found.is_meta and not bool(((found > 0) & (found < torch.inf)).all()):
        raise SpaceMismatchError(
            f"expected a weight of positive finite numbers in {found.dtype}, got {float(found.min()):.3g} to "
            f"{float(found.max()):.3g}: ⟨x, x⟩ must be positive; take entries without weight out of x"
        )
    return Entries(found)


def _require_alike(space: Space, parts: Sequence[Entries]) -> None:
    """Raise unless processes that hold the same entries of a sharded space have the same weights."""
    alike = True
    for part, spec in zip(parts, space.specs, strict=True):
        if spec.sharding is not None:
            own = part.values.double().expand(spec.shape).contiguous()
            mean = spec.sharding.share * spec.sharding.reduce(own)
            alike = alike and bool(((mean - own).abs() <= _UNITS * space.eps * own).all())
    if not space.every(alike):
        raise SpaceMismatchError(
            f"expected equal weights on processes that hold the same entries of {space}, got different ones: give "
            "each process its part of one weight"
        )


def _pair(space: Space, function: Map, inverse: Map) -> Pair:
    """Return an operator with its inverse as a weight, tested on random elements, or raise."""
    for name, given in (("W", function), ("W_inverse", inverse)):
        for side in ("domain", "codomain"):
            other = getattr(given, side, None)
            if other is not None and (
                other.batch_dims < space.batch_dims or other != space.with_batch_dims(other.batch_dims)
            ):
                raise SpaceMismatchError(
                    f"expected {name} of a weight from {space} to itself, got the {side} {other}: build it on the "
                    "space without a weight"
                )
    pair = Pair(function, inverse, space)
    with torch.no_grad(), space.without_autocast():
        reason = _refutation(pair)
    if reason:
        raise SpaceMismatchError(
            f"expected a weight W that is linear, self-adjoint and positive, with its inverse, {reason}"
        )
    return pair


def _refutation(pair: Pair) -> str:
    """Return in words why an operator is no weight, as far as random elements show, or an empty string."""
    space = pair.space
    draw = torch.Generator().manual_seed(0)
    x, z = (space.leaves(space.randn(draw)) for _ in range(2))
    noise = space.leaves(space.randn(draw))
    i = 1j if all(spec.is_complex for spec in space.specs) else -2.0

    def plus(a: Leaves, b: Leaves, factor: Any = 1.0) -> list[Tensor]:
        return [u + factor * v for u, v in zip(a, b, strict=True)]

    def norm(a: Leaves) -> float:
        return float(space.norm(space.unflatten(a)))

    def inner(a: Leaves, b: Leaves) -> complex:
        return complex(space.inner(space.unflatten(a), space.unflatten(b)))

    wx, wz, sum_ = pair.times(x, False), pair.times(z, False), pair.times(plus(x, z, i), False)
    sizes = norm(wx), norm(wz)
    if not norm(plus(sum_, plus(wx, wz, i), -1.0)) <= _UNITS * space.eps * (sizes[0] + 2 * sizes[1]):
        return f"but W(x {'+ iz' if i == 1j else '− 2z'}) is not Wx {'+ iWz' if i == 1j else '− 2Wz'}"
    if not abs(inner(wx, z) - inner(x, wz)) <= _UNITS * space.eps * (sizes[0] * norm(z) + norm(x) * sizes[1]):
        return "but ⟨Wx, z⟩ is not ⟨x, Wz⟩: take (W + W.H) / 2"
    back = pair.divided(wx)
    moved = pair.divided([t * (1 + space.eps * r.real) for t, r in zip(wx, noise, strict=True)])
    allowed = _UNITS * (space.eps * norm(x) + norm(plus(moved, back, -1.0)))
    if not norm(plus(back, x, -1.0)) <= allowed:
        return "but W_inverse(W(x)) is not x"
    if not all(inner(t, image).real > 0 for t, image in ((x, wx), (z, wz), (x, pair.divided(x)))):
        return "but ⟨x, Wx⟩ is not positive"
    for name, apply in (("W", lambda u: pair.times(u, False)), ("W_inverse", pair.divided)):
        expected = apply(z)
        if not norm(plus(_derivative(apply, x, z), expected, -1.0)) <= norm(expected) / 16:
            return f"but autograd does not see through {name}: make an operator of it, al.from_pair({name}, {name}, …)"
    return ""


def _derivative(apply: Callable[[Leaves], Leaves], x: Leaves, v: Leaves) -> Leaves:
    """Return autograd's derivative of a self-adjoint map, zero where it sees none."""
    seen = []
    with (
        torch.enable_grad(),
        contextlib.suppress(RuntimeError, NotImplementedError),
    ):  # it is not differentiable, it says
        probe = [t.clone().requires_grad_() for t in x]
        seen = [(image, w) for image, w in zip(apply(probe), v, strict=True) if image.requires_grad]
    if not seen:
        return [torch.zeros_like(t) for t in x]
    images, cotangents = zip(*seen, strict=True)
    return torch.autograd.grad(images, probe, cotangents, materialize_grads=True)


def _moved_pair(part: Pair, function: Callable[[Tensor], Tensor], space: Space) -> Pair:
    """Return a pair for another dtype or device: copies of modules are moved, other functions are tested there."""
    W, inverse = (
        copy.deepcopy(given)._apply(function) if isinstance(given, nn.Module) else given
        for given in (part.function, part.inverse)
    )
    return _pair(space, W, inverse)
