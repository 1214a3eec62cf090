"""The eager reference: a function at a point, with the pull-back of autograd, which is ``Aᴴ`` of a linear one.

``torch.func.vjp`` comes first. It refuses some functions that ``torch.autograd.grad`` takes (old-style
``autograd.Function``, custom ops with ``register_autograd``, sparse CSR); the second is then the reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from adjointlab.linked import pulled_back
from adjointlab.modules import Source
from adjointlab.space import Space
from adjointlab.space.algebra import moved
from adjointlab.space.refusals import remedy_for
from adjointlab.tree import Structure, tree_flatten

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]
REFUSALS = (RuntimeError, NotImplementedError, AssertionError)  # the last by torch.cond, scan and map


@dataclass(frozen=True)
class Linearized:
    """A function at a point: its result there, and the pull-back ``v ↦ Jᴴ v``, which may be called again and again."""

    outputs: Tensors
    pull_back: Function
    inputs: Tensors = ()  # the point, as autograd knows it
    kept: float = math.inf  # bytes that the pull-back keeps alive, infinite where that is not known
    is_alone: bool = False  # whether it is known that it depends on no other tensor that requires gradients


def _outside_of_inference(linearized: Callable[..., Linearized]) -> Callable[..., Linearized]:
    """Leave inference mode for a while, in which nothing is recorded, and all gradients would be zero."""

    def outside(function: Function, primals: Tensors, *, once: bool = False) -> Linearized:
        if not torch.is_inference_mode_enabled():
            return linearized(function, primals, once=once)
        with torch.inference_mode(False), torch.no_grad():
            found = linearized(function, tuple(p.clone() for p in primals), once=once)

        def pull_back(cotangents: Tensors) -> Tensors:
            with torch.inference_mode(False), torch.no_grad():
                return found.pull_back(tuple(c.clone() for c in cotangents))

        return replace(found, pull_back=pull_back)

    return outside


@_outside_of_inference
def linearized_by_func(function: Function, primals: Tensors, *, once: bool = False) -> Linearized:
    """Return a function at a point by ``torch.func.vjp``; ``once`` frees what the pull-back has used."""
    outputs, pull_back = _vjp(function, primals)

    def back(cotangents: Tensors) -> Tensors:
        keep = torch.is_grad_enabled() or not once
        return _pulled(outputs, functools.partial(pull_back, retain_graph=keep), cotangents)

    return Linearized(outputs, back)


@_outside_of_inference
def linearized_by_grad(function: Function, primals: Tensors, *, once: bool = False) -> Linearized:
    """Return a function at a point by ``torch.autograd.grad``; ``once`` frees what the pull-back has used."""
    with torch.enable_grad():
        inputs = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in primals)
        # A view of the leaf is handed over, since autograd forbids writing to a leaf in place.
        outputs = function(tuple(leaf.view_as(leaf) for leaf in inputs))

    def back(cotangents: Tensors) -> Tensors:
        given = _like(cotangents, outputs)
        # In what nobody else asks for, results are not to require gradients: autograd was told to follow the inputs.
        create = torch.is_grad_enabled() and (
            any(t.requires_grad for t in (*primals, *cotangents)) or not _is_alone(outputs, inputs)
        )
        return pulled_back(outputs, inputs, given, create=create, retain=not once)

    return Linearized(outputs, back, inputs)


def measured(function: Function, primals: Tensors) -> Linearized:
    """Return a function at a point by autograd, with the bytes that it keeps, and whether it is known to be alone."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = linearized_by_grad(function, primals)
    return replace(found, kept=sum(seen.values()), is_alone=_is_alone(found.outputs, found.inputs))


def _is_alone(outputs: Tensors, inputs: Tensors) -> bool:
    """Return whether the outputs depend on no tensor that requires gradients, besides the inputs."""
    leaves = {id(node.variable) for node in nodes_of(outputs) if hasattr(node, "variable")}
    return leaves.issubset(map(id, inputs))


def nodes_of(outputs: Sequence[Tensor]) -> list[Any]:
    """Return the nodes of autograd's graph of some tensors."""
    seen, pending = dict[Any, None](), [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen[node] = None
            pending.extend(following for following, _ in node.next_functions)
    return list(seen)


def vjp_by_func(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.func.vjp``, in a form that torch.compile takes too."""
    return _pulled(*_vjp(function, primals), cotangents)


def _vjp(function: Function, primals: Tensors) -> tuple[Tensors, Any]:
    result: tuple[Any, ...] = torch.func.vjp(lambda *leaves: function(leaves), *primals)
    return result[0], result[1]


def _pulled(outputs: Tensors, pull_back: Any, cotangents: Tensors) -> Tensors:
    if len(cotangents) != len(outputs):
        raise RuntimeError(f"the forward returned {len(outputs)} tensors where it had returned {len(cotangents)}")
    return tuple(pull_back(tuple(cotangents)))


def vjp_by_grad(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.autograd.grad``."""
    return linearized_by_grad(function, primals, once=True).pull_back(cotangents)


def _like(cotangents: Tensors, outputs: Tensors) -> Tensors:
    before, now = ([tuple(t.shape) for t in tensors] for tensors in (cotangents, outputs))
    if before != now:
        raise SpaceMismatchError(
            f"expected the function to return tensors of shapes {before}, as it did, but it returns {now}: build the "
            "operator anew"
        )
    return tuple(cotangents)


@dataclass(frozen=True)
class Choice:
    """The way to take the derivative of a function, and why that is not ``torch.func.vjp`` where it is so."""

    linearize: Callable[..., Linearized]
    why: str


def choose(function: Function, primals: Tensors, cotangents: Tensors) -> tuple[Choice, Linearized, Tensors]:
    """Return the way that works for a function, the function as it found it, and what that pulls cotangents back to."""
    try:
        found = linearized_by_func(function, primals)
        result = found.pull_back(cotangents)
        if not compat.plain() or any(t.any() for t in result):
            return Choice(linearized_by_func, ""), found, result
        # Of what runs in another thread, torch.func sees nothing.
        other = linearized_by_grad(function, primals)
        seen = other.pull_back(cotangents)
        if any(t.any() for t in seen):
            return Choice(linearized_by_grad, "torch.func.vjp does not see it"), other, seen
        return Choice(linearized_by_func, ""), found, result
    except REFUSALS as refusal:
        try:
            found = linearized_by_grad(function, primals)
            result = found.pull_back(cotangents)
        except REFUSALS as error:
            raise NotDifferentiableError(
                f"expected a map that autograd can differentiate, but it says: {first_line(error).rstrip('.')}; "
                "write that part with other ops, or as an autograd.Function"
            ) from refusal
        return Choice(linearized_by_grad, f"torch.func.vjp refuses it ({first_line(refusal)})"), found, result


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def applied(function: Callable[..., Any], x: Any, kwargs: dict[str, Any]) -> Any:
    """Return what a function makes of an element of its domain: a tuple is spread over its arguments."""
    return function(*x, **kwargs) if type(x) is tuple else function(x, **kwargs)


def flatten_outputs(output: Any) -> tuple[Tensors, Structure | None]:
    """Return the leaves of what a function returned, and how they hang together, None for a single tensor."""
    if isinstance(output, Tensor) and not output.is_nested:
        return (output,), None
    flat, structure = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
    for leaf in flat:
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise SpaceMismatchError(
                "expected the forward to return tensors of one size, got a nested tensor: return a tuple of tensors"
            )
        if not isinstance(leaf, Tensor):
            raise SpaceMismatchError(
                f"expected the forward to return a tensor or a pytree of tensors, got {type(leaf).__name__} "
                f"({str(leaf)[:60]}): {remedy_for(leaf)}"
            )
    if not flat:
        raise SpaceMismatchError("expected the forward to return at least one tensor, got an empty pytree")
    return tuple(flat), structure


class PullBack:
    """``v ↦ J(x₀)ᴴ v``: what autograd makes of cotangents of a function at a point, the leaves of an element."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any], domain: Space, point: Tensors) -> None:
        self.function, self.kwargs, self.domain, self.point = function, kwargs, domain, point
        self.sources = tuple(
            Source(functools.partial(_itself, leaf), f"x0, leaf {i}" if len(point) > 1 else "x0", is_private=True)
            for i, leaf in enumerate(point)
        )
        self._choice: Choice | None = None

    def at(self, point: Tensors) -> PullBack:
        """Return the pull-back of the same function elsewhere."""
        found = PullBack(self.function, self.kwargs, self.domain, point)
        found._choice = self._choice
        return found

    def moved(self, fn: Callable[[Tensor], Tensor]) -> PullBack:
        """Return the pull-back with its point on another device, or of another dtype."""
        return PullBack(self.function, self.kwargs, moved(self.domain, fn), tuple(map(fn, self.point)))

    def value(self, leaves: Tensors) -> tuple[Tensors, Structure | None]:
        """Return the leaves of ``f(x)``, and how they hang together."""
        x = self.domain.unflatten([leaf.clone() for leaf in leaves])  # which the function may write to
        return flatten_outputs(applied(self.function, x, self.kwargs))

    def __call__(self, *v: Any) -> Any:
        """Return ``J(x₀)ᴴ v``."""
        cotangents = tuple(tree_flatten(v)[0])

        def flat(leaves: Tensors) -> Tensors:
            return self.value(leaves)[0]

        if torch.compiler.is_compiling():
            return self.domain.unflatten(vjp_by_func(flat, self.point, cotangents))
        if self._choice is None:
            self._choice, _, found = choose(flat, self.point, cotangents)
        else:
            found = self._choice.linearize(flat, self.point, once=True).pull_back(cotangents)
        return self.domain.unflatten(found)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
