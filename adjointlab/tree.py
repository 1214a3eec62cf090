"""Flattening of pytrees, and of objects that hold tensors as attributes, into leaves and structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab.compat import pytree


@dataclass(frozen=True)
class Structure:
    """The structure of a pytree whose leaves may be objects that hold tensors as attributes (``holders``).

    A holder is a container that is not registered with pytree, such as deepinv's ``TensorList``. It is flattened into
    its attributes, and rebuilt from a copy without its tensors (the ``shell``).
    """

    spec: pytree.TreeSpec
    holders: tuple[tuple[int, Any, tuple[str, ...], Structure], ...] = ()

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """Return the tree with the given leaves."""
        rest = list(leaves)
        for position, shell, names, inner in self.holders:
            count = inner.num_leaves
            attributes = inner.unflatten(rest[position : position + count])
            rebuilt = copy.copy(shell)
            vars(rebuilt).update(zip(names, attributes, strict=True))
            rest[position : position + count] = [rebuilt]
        return pytree.tree_unflatten(rest, self.spec)

    def leaves(self, tree: Any) -> list[Any] | None:
        """Return the leaves of a tree of this structure, whatever the order of dictionary keys; None for another."""
        leaves, structure = tree_flatten(tree)
        if structure is self or structure == self:
            return leaves
        if self.holders:
            return None
        try:
            return self.spec.flatten_up_to(tree)
        except ValueError:  # a different tree
            return None

    @property
    def num_leaves(self) -> int:
        """Number of leaves, including the leaves inside holders."""
        return int(self.spec.num_leaves) + sum(inner.num_leaves - 1 for *_, inner in self.holders)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Structure):
            return NotImplemented
        mine, theirs = ([(at, names, inner) for at, _, names, inner in s.holders] for s in (self, other))
        shells = zip(self.holders, other.holders, strict=False)
        return bool(self.spec == other.spec) and mine == theirs and all(_alike(a[1], b[1]) for a, b in shells)

    def __hash__(self) -> int:
        return hash((str(self.spec), len(self.holders)))


def _alike(a: Any, b: Any) -> bool:
    """Return whether two objects hold the same, apart from tensors: a spacing, say."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if hasattr(a, "__dict__") and "__eq__" not in {name for kind in type(a).__mro__[:-1] for name in vars(kind)}:
        return _alike(vars(a), vars(b))
    same = a == b
    return same if isinstance(same, bool) else bool(getattr(same, "all", bool)())


SINGLE = Structure(pytree.tree_flatten(torch.empty(0))[1])


def has_tensor(value: Any) -> bool:
    """Return whether a pytree has a leaf that is a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def map_leaves(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Return the pytree of ``function(leaf, …)``; it is called once for plain tensors, which take no flattening."""
    return function(*trees) if isinstance(trees[0], Tensor) else pytree.tree_map(function, *trees)


def tree_flatten(tree: Any) -> tuple[list[Any], Structure]:
    """Flatten a pytree, or an object that holds tensors as attributes, into leaves and structure."""
    if isinstance(tree, Tensor):
        return [tree], SINGLE
    raw, spec = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    holders = []
    for leaf in raw:
        attributes = {} if isinstance(leaf, (Tensor, type, torch.nn.Module)) else getattr(leaf, "__dict__", {})
        names = tuple(sorted(name for name, value in attributes.items() if has_tensor(value)))
        if not names:
            leaves.append(leaf)
            continue
        shell = copy.copy(leaf)
        vars(shell).update(dict.fromkeys(names))
        inner_leaves, inner = tree_flatten([attributes[name] for name in names])
        holders.append((len(leaves), shell, names, inner))
        leaves.extend(inner_leaves)
    return leaves, Structure(spec, tuple(holders)) if holders else Structure(spec)
