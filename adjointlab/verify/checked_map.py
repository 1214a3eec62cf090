"""A map of the dot-product test, whose results are checked, and the structured inputs of the test."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.progress import step
from adjointlab.space import Space
from adjointlab.space.refusals import remedy_for
from adjointlab.space.spec import describe
from adjointlab.tree import tree_flatten

Tensors = tuple[Tensor, ...]

_MOST_LEAVES = 4  # largest number of leaves that are tested with impulses
_PHASE = 0.8 + 0.6j  # phase of complex impulses and constants: neither real nor imaginary


class BrokenError(Exception):
    """A map raised, or its result cannot be compared; the message is the diagnosis."""


class ExhaustedError(Exception):
    """A diagnosis has used all the applications of operators that it may use."""


class Meter:
    """The number of applications of operators that are left to a diagnosis."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self) -> None:
        """Count one application; raise ``ExhaustedError`` if none is left."""
        if self.left <= 0:
            raise ExhaustedError
        self.left -= 1


class CheckedMap:
    """A or B as a map on leaves: the function gets copies, and its result is checked.

    A map that is ``read_only`` must not write to its argument.
    """

    meter: Meter | None = None

    def __init__(
        self, function: Callable[[Any], Any], space: Space, codomain: Space, name: str, *, read_only: bool = False
    ) -> None:
        self.function, self.space, self.codomain, self.name = function, space, codomain, name
        self.read_only = read_only

    def metered(self, meter: Meter) -> CheckedMap:
        """Return the same map with its calls counted."""
        other = copy.copy(self)
        other.meter = meter
        return other

    def __call__(self, leaves: Tensors) -> Tensors:
        """Return the leaves of the image; a ``BrokenError`` says that it is no finite element of the codomain."""
        # If the space is sharded, what the function raises is raised as it is: other processes wait inside it.
        step()
        if self.meter is not None:
            self.meter.spend()
        try:
            result, copies = self._result(leaves)
        except BrokenError:  # of a map inside this one
            raise
        except Exception as error:  # the user's function may raise anything, which is the diagnosis
            if self.space.is_sharded:
                raise
            line = next(iter(str(error).splitlines()), "")
            raise BrokenError(f"{self.name} raised {type(error).__name__}: {line}") from error
        if self.read_only and not self.space.every(all(map(torch.equal, copies, leaves))):
            raise BrokenError(f"{self.name} writes to its argument: copy it first, as in y = y.clone()")
        found: Tensors = ()
        try:
            found = self.codomain.leaves(result)
        except (SpaceMismatchError, TypeError, ValueError, AttributeError):
            if not self.space.is_sharded:
                raise BrokenError(_wrong_kind(self.name, result, self.codomain)) from None
        if not self.space.every(bool(found)):
            here = "" if found else ", this one included"
            raise BrokenError(f"{self.name}: what it returned is not in the codomain on some processes{here}")
        if not self.codomain.every(all(bool(torch.isfinite(leaf).all()) for leaf in found)):
            raise BrokenError(f"{self.name} returned NaN or infinity for finite input")
        # The batch sizes of the result must equal those of the input.
        k = self.codomain.batch_dims
        if k and found[0].shape[:k] != leaves[0].shape[: self.space.batch_dims]:
            raise BrokenError(_wrong_kind(self.name, result, self.codomain.with_batch(leaves[0].shape[:k])))
        return tuple(leaf.detach().clone() for leaf in found)  # the next call may overwrite the result

    def _result(self, leaves: Tensors) -> tuple[Any, list[Tensor]]:
        copies = [leaf.clone() for leaf in leaves]
        try:
            return self.function(self.space.unflatten(copies)), copies
        except RuntimeError:
            if torch.is_grad_enabled():
                raise
        with torch.enable_grad():  # the function may call autograd.grad inside, which needs grad mode
            return self._result(leaves)


def _wrong_kind(name: str, result: Any, space: Space) -> str:
    """Return in words why ``result`` is not an element of ``space``: structure, shape, dtype or device."""
    if result is None:
        return f"{name} returned None: a return statement is missing"
    flat, _ = tree_flatten(result)
    others = [leaf for leaf in flat if not isinstance(leaf, Tensor)]
    if others:
        return f"{name}: expected tensors, got {describe(others[0])}: {remedy_for(others[0])}"
    if len(flat) != len(space.specs):
        kinds = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in flat[:4])
        wanted = ", ".join(str(spec.shape) for spec in space.specs[:4])
        return f"{name}: wrong structure: {len(flat)} leaves ({kinds}) where {len(space.specs)} ({wanted}) are expected"
    for leaf, spec in zip(flat, space.specs, strict=True):
        got, wanted_shape = tuple(leaf.shape), spec.shape
        if got != wanted_shape:
            return f"{name}: wrong shape: {got} where {wanted_shape} is expected{_why_shape(got, wanted_shape)}"
        if leaf.dtype != spec.dtype:
            is_dtype, wanted_dtype = (str(dtype).removeprefix("torch.") for dtype in (leaf.dtype, spec.dtype))
            whys = {(True, False): ": take the real part", (False, True): ": only real part"}
            why = whys.get((leaf.is_complex(), spec.is_complex), "")
            return f"{name}: wrong dtype: {is_dtype} where {wanted_dtype} is expected{why}"
        if leaf.device != spec.device:
            return f"{name}: wrong device: {leaf.device} where {spec.device} is expected"
    return f"{name}: wrong structure: {type(result).__name__} is not the pytree of the space"


def _why_shape(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(got) != len(wanted):
        return f": {len(got)} dimensions for {len(wanted)}"
    if sorted(got) == sorted(wanted):
        return ": dimensions transposed"
    gaps = [w - g for g, w in zip(got, wanted, strict=True)]
    dims = [dim for dim, gap in enumerate(gaps) if gap]
    if min(dims) >= 1 and all(gap >= 0 for gap in gaps):
        return f": output_padding of {', '.join(str(gaps[d]) for d in dims)} (or cropped) along dim {listed(dims)}"
    if min(dims) >= 1 and all(gap <= 0 for gap in gaps):
        return f": not cropped along dim {listed(dims)}, the adjoint of padding"
    return f": differs along dim {listed(dims)}"


def listed(dims: Iterable[int]) -> str:
    """Return dimensions in words: ``"2 and 3"``."""
    return " and ".join(map(str, dims))


def impulse(space: Space, leaf: int, index: tuple[int, ...]) -> Tensors:
    """Return the leaves of the unit vector whose nonzero entry is at ``index`` of one leaf."""
    leaves = space.leaves(space.zeros())
    leaves[leaf][index].fill_(_PHASE if leaves[leaf].is_complex() else 1.0)
    return leaves


def vanishes(space: Space, leaves: Tensors) -> bool:
    """Return whether all entries are zero on all processes."""
    return space.every(not any(bool(leaf.any()) for leaf in leaves))


def number_of_structured(space: Space) -> int:
    """Return how many elements :func:`structured` yields, at most."""
    return 3 * len(space.specs[:_MOST_LEAVES]) + 1


def structured(space: Space) -> Iterator[tuple[str, Tensors]]:
    """Yield impulses at the centre and the first and last corner of the first few leaves, and a constant."""
    for number, spec in enumerate(space.specs[:_MOST_LEAVES]):
        where = f" of leaf {number}" if len(space.specs) > 1 else ""
        ends = [(size // 2, 0, size - 1) for size in spec.shape]
        places = list(zip(*ends, strict=True)) or [()] * 3
        # If sharded, all processes must make the same number of draws.
        for index in places if space.is_sharded else dict.fromkeys(places):
            yield f"impulse at {index}{where}", impulse(space, number, index)
    size = 2.0 ** -round(math.log2(space.size) / 2)  # of norm about one: sums of many ones overflow in half precision
    leaves = space.leaves(space.zeros())
    yield "constant", tuple(torch.full_like(t, size * (_PHASE if t.is_complex() else 1.0)) for t in leaves)
