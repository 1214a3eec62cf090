"""Chains of random linear operations, each operator compared with the dense matrix of the plain function.

An operator is made from its number alone: `FUZZ_FIRST=n FUZZ_OPERATORS=1` makes operator n again.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from built import first_way, last_way, operator
from laws import call, coordinates
from laws import leaves as ordered
from operation_table import TABLE, Draw, UnsuitableError
from progress import shown
from torch import Tensor, nn

import adjointlab as al

LARGEST = 60  # entries of any tensor
LONGEST = 6  # chain
TOGETHER = 6  # operations that a chain must have, in the first chains: so that few chains have all
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
OPERATORS = int(os.environ.get("FUZZ_OPERATORS", str(math.ceil(len(TABLE) / TOGETHER))))
MOST_REPORTED = 20
UNITS = 1e4  # of rounding, relative to the largest norm on the way: a wrong entry is larger by orders of magnitude
DTYPES = [torch.float64] * 5 + [torch.complex128] * 4 + [torch.float32, torch.complex64]


def flat(tree: Any) -> list[Tensor]:
    """Return the leaves of a tree, those of dictionaries in the order of their keys, as PyTorch has them."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = [tree[key] for key in tree] if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in flat(part)]


def numbered(tree: Any, count: itertools.count) -> Any:
    """Return the tree with numbers in place of leaves."""
    if isinstance(tree, Tensor):
        return next(count)
    if isinstance(tree, dict):
        return {key: numbered(part, count) for key, part in tree.items()}
    return type(tree)(numbered(part, count) for part in tree)


def filled(numbers: Any, leaves: list[Tensor]) -> Any:
    """Return the tree with leaves in place of numbers."""
    if isinstance(numbers, int):
        return leaves[numbers]
    if isinstance(numbers, dict):
        return {key: filled(part, leaves) for key, part in numbers.items()}
    if isinstance(numbers, tuple):
        return tuple([filled(part, leaves) for part in numbers])
    return [filled(part, leaves) for part in numbers]


@dataclass
class Step:
    """An operation on the leaf of a number, or on all leaves."""

    name: str
    function: Callable[[Any], Any]
    leaf: int | None

    def __str__(self) -> str:
        return self.name if self.leaf in {0, None} else f"{self.name} of leaf {self.leaf}"


@dataclass
class Chain:
    """What is made from a number: a domain, and operations one after the other."""

    number: int
    domain: Any
    steps: list[Step] = field(default_factory=list)
    shape: Any = 0
    """The tree of results, with numbers in place of leaves."""
    engine: str = "auto"
    is_module: bool = False

    def __str__(self) -> str:
        leaves = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in flat(self.domain))
        kind = f"{'module' if self.is_module else 'function'}, engine={self.engine!r}"
        return (
            f"operator {self.number} ({kind}) on {type(self.domain).__name__} of {leaves}: "
            f"{' → '.join(map(str, self.steps))}\n    replay with FUZZ_FIRST={self.number} FUZZ_OPERATORS=1"
        )

    def function(self) -> Callable[..., Any]:
        """Return the map as a function, or a module, of the arguments that the domain is spread over."""
        steps, shape = [(step.function, step.leaf) for step in self.steps], self.shape

        def run(*arguments: Any) -> Any:
            leaves = flat(arguments)
            for function, leaf in steps:
                if leaf is None:
                    leaves = flat(function(leaves))
                else:
                    leaves[leaf] = function(leaves[leaf])
            return filled(shape, leaves)

        return Called(run) if self.is_module else run

    def norms(self, x: Any) -> list[float]:
        """Return the norm of x and of what comes after each step."""
        leaves, found = flat(x), []
        for step in [None, *self.steps]:
            if step is not None and step.leaf is None:
                leaves = flat(step.function(leaves))
            elif step is not None:
                leaves[step.leaf] = step.function(leaves[step.leaf])
            found.append(float(coordinates(leaves).norm()))
        return found


class Called(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *arguments: Any) -> Any:
        return self.run(*arguments)


# ------------------------------------------------------------------------------------------------------- making chains


def drawn_domain(rng: random.Random) -> Any:
    dtype = rng.choice(DTYPES)

    def leaf() -> Tensor:
        while True:
            shape = tuple(rng.choice((1, 2, 2, 3, 3, 4, 5, 6)) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4))))
            if math.prod(shape) <= 24:
                return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(rng.getrandbits(32)))

    kind = rng.choice(("tensor",) * 6 + ("tuple", "dictionary", "list"))
    if kind == "tensor":
        return leaf()
    if kind == "tuple":
        return (leaf(), leaf())
    return {"u": leaf(), "v": (leaf(),)} if kind == "dictionary" else [leaf(), leaf()]


def refuses(leaves: list[Tensor]) -> bool:
    sizes = [leaf.numel() for leaf in leaves]
    return not sizes or min(sizes) == 0 or sum(sizes) > LARGEST


def drawn_step(rng: random.Random, leaves: list[Tensor], name: str | None) -> tuple[Step, Any] | None:
    """Return a step that can follow, with the tree of what comes of it, or None where the one asked for cannot."""
    for _ in range(6):
        operation = TABLE[name or rng.choice(list(TABLE))]
        leaf = None if operation.on_tree else rng.randrange(len(leaves))
        example = leaves[leaf or 0]
        try:
            function = operation.make(Draw(rng, tuple(example.shape), example.dtype))
            result = function(leaves if leaf is None else example)
        except (UnsuitableError, RuntimeError, ValueError, IndexError):
            continue
        after = flat(result) if leaf is None else [*leaves[:leaf], *flat(result), *leaves[leaf + 1 :]]
        if not refuses(after):
            return Step(operation.name, function, leaf), result
    return None


def made(number: int) -> Chain:
    """Return a chain, the same one for a number each time."""
    rng = random.Random(number)
    torch.manual_seed(number)
    names = list(TABLE)
    for _ in range(400):
        required = names[number * TOGETHER : (number + 1) * TOGETHER]
        wanted: list[str | None] = [*required, *[None] * (rng.randint(1, LONGEST) - len(required))]
        rng.shuffle(wanted)
        domain = drawn_domain(rng)
        engine = "eager" if rng.random() < (0.75 if required else 0.2) else "auto"
        chain = Chain(number, domain, engine=engine, is_module=rng.random() < 0.3)
        leaves = flat(domain)
        chain.shape = numbered(domain, itertools.count())
        if isinstance(domain, tuple):
            chain.shape = tuple(range(len(leaves)))
        with torch.no_grad():
            for name in wanted:
                drawn = drawn_step(rng, leaves, name)
                if drawn is None:
                    break
                step, result = drawn
                chain.steps.append(step)
                if step.leaf is None:
                    leaves, chain.shape = flat(result), numbered(result, itertools.count())
                else:
                    leaves = [*leaves[: step.leaf], result, *leaves[step.leaf + 1 :]]
            else:
                return chain
    raise AssertionError(f"operator {number}: no chain of {wanted} was found, change the table")


# ----------------------------------------------------------------------------------------------------------- comparison


def element(example: Any, at: Tensor) -> Any:
    """Return the element with these coordinates, like an example."""
    leaves, structure = torch.utils._pytree.tree_flatten(example)
    found = []
    for leaf in leaves:
        n = leaf.numel()
        if leaf.is_complex():
            whole, at = torch.complex(at[:n], at[n : 2 * n]), at[2 * n :]
        else:
            whole, at = at[:n], at[n:]
        found.append(whole.reshape(leaf.shape).to(leaf.dtype))
    return torch.utils._pytree.tree_unflatten(found, structure)


def matrix(function: Callable[[Any], Any], example: Any) -> Tensor:
    """Return the real matrix of a function, column by column."""
    columns = [
        coordinates(ordered(function(element(example, e)))) for e in torch.eye(len(coordinates(example))).double()
    ]
    return torch.stack(columns, 1)


def unusual(tree: Any) -> Any:
    """Return an equal element whose leaves are not contiguous, and conjugated and negated lazily."""

    def leaf(t: Tensor) -> Tensor:
        wide = torch.stack([t, 0 * t], -1)[..., 0]
        return (
            torch.conj(wide.conj().resolve_conj())
            if t.is_complex()
            else torch.view_as_complex(torch.stack([0 * t, -t], -1)).conj().imag
        )

    return torch.utils._pytree.tree_map(leaf, tree)


def multiplied_by_i(example: Any) -> Tensor:
    """Return the matrix of `x ↦ i x`."""
    return matrix(lambda x: torch.utils._pytree.tree_map(lambda t: 1j * t, x), example)


def complaints(function: Callable[..., Any], x: Any, A: al.LinearOperator, scale: float) -> list[str]:
    """Return what is wrong with an operator for a function; `scale` is the largest norm on the way."""
    with torch.no_grad():
        y = call(function, x)
        M = matrix(lambda z: call(function, z), x)
        found = []
        eps = max(torch.finfo(t.dtype).eps for t in (*ordered(x), *ordered(y)))

        def compare(what: str, expected: Tensor, result: Tensor, size: float) -> None:
            gap = float((expected - result).abs().max())
            allowed = UNITS * eps * size
            if not gap <= allowed:
                found.append(
                    f"{what} is wrong by {gap:.3g}, of {float(expected.abs().max()):.3g}; {allowed:.3g} is allowed"
                )

        at_x = M @ coordinates(ordered(x))
        size = max(scale, float(M.norm()))
        compare("the table: f(x)", at_x, coordinates(ordered(y)), size)
        if structure(A(x)) != structure(y):
            found.append(f"A(x) is {structure(A(x))}, not {structure(y)}")
            return found
        compare("A(x)", at_x, coordinates(ordered(A(x))), size)
        compare("A(x), x laid out unusually,", at_x, coordinates(ordered(A(unusual(x)))), size)
        if structure(A.H(y)) != structure(x):
            found.append(f"A.H(y) is {structure(A.H(y))}, not {structure(x)}")
            return found
        compare("A", M, matrix(A, x), size)
        compare("A.H", M.mT, matrix(A.H, y), size)
        back = M.mT @ coordinates(ordered(y))
        compare("A.H(y), y laid out unusually,", back, coordinates(ordered(A.H(unusual(y)))), size * max(1, size))
        complexes = [t.is_complex() for t in (*ordered(x), *ordered(y))]
        linear = not any(complexes)
        if all(complexes):
            gap = float((M @ multiplied_by_i(x) - multiplied_by_i(y) @ M).norm())
            linear = gap <= 1e-3 * float(M.norm()) or gap <= UNITS * eps * size
        is_zero = float(M.norm()) <= 64 * eps * size  # but for rounding, of which neither answer is right
        if A.is_complex_linear != linear and not is_zero:
            found.append(f"is_complex_linear is {A.is_complex_linear}, not {linear}")
    return found


def autograd_gap(function: Callable[..., Any], x: Any) -> float:
    """Return how far the derivative by plain autograd is from the map itself.

    That of `as_strided_scatter`, say, reads a slice from the start of the memory that it looks at.
    """
    with torch.no_grad():
        y, expected = call(function, x), matrix(lambda z: call(function, z), x).mT

    def pull_back(v: Any) -> list[Tensor]:
        z = torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), x)
        inputs, outputs = ordered(z), ordered(call(function, z))
        seen = [(out, w) for out, w in zip(outputs, ordered(v), strict=True) if out.requires_grad]
        outs, cotangents = zip(*seen, strict=True)
        found = torch.autograd.grad(outs, inputs, cotangents, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]

    return float((expected - matrix(pull_back, y)).abs().max())


def structure(tree: Any) -> Any:
    leaves, spec = torch.utils._pytree.tree_flatten(tree)
    return spec, [(tuple(t.shape), t.dtype) for t in leaves]


def examined(chain: Chain) -> tuple[list[str], str]:
    """Return what is wrong with the operator of a chain, and the engine that it has."""
    function = chain.function()
    with torch.no_grad():
        scale = max(chain.norms(chain.domain))
    try:
        choices = ({}, {"choose_map": first_way}, {"choose_map": last_way})  # small ones have no maps of themselves
        A = operator(function, chain.domain, None, requested=chain.engine, **choices[chain.number % 3])
        return complaints(function, chain.domain, A, scale), A.engine
    except al.NotDifferentiableError as error:  # rightly, where torch's own derivative is another map
        eps = max(torch.finfo(t.dtype).eps for t in ordered(chain.domain))
        is_right = autograd_gap(function, chain.domain) > UNITS * eps * max(1.0, scale)
        return [] if is_right else [f"{type(error).__name__}: {error}"], "none"
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], "none"


def parts(chain: Chain) -> Iterator[Chain]:
    """Return what is left of a chain without some of its first and last steps, the shortest parts first."""
    befores, trees, leaves = [], [], flat(chain.domain)
    shape = tuple(range(len(leaves))) if isinstance(chain.domain, tuple) else numbered(chain.domain, itertools.count())
    with torch.no_grad():
        for step in chain.steps:
            befores.append([leaf.clone() for leaf in leaves])
            if step.leaf is None:
                tree = step.function(leaves)
                leaves, shape = flat(tree), numbered(tree, itertools.count())
            else:
                leaves = [*leaves[: step.leaf], step.function(leaves[step.leaf]), *leaves[step.leaf + 1 :]]
            trees.append(shape)
    n = len(chain.steps)
    for length in range(1, n + 1):
        for first in range(n - length + 1):
            last = first + length
            steps, tree = chain.steps[first:last], trees[last - 1]
            yield replace(chain, domain=tuple(befores[first]), steps=steps, shape=tree)


def smallest(chain: Chain) -> str:
    """Return the shortest part of a chain that is wrong, with its domain: most often one or two steps."""
    for part in parts(chain):
        found, _ = examined(part)
        if found:
            described = str(part).split("\n")[0].split(" on ", 1)[1]
            return f"the shortest part that is wrong: {described}: {found[0]}"
    return "no part of it is wrong"


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.slow
def test_operators_are_the_matrices_of_their_functions():
    used, engines, failures = Counter(), Counter(), []
    for number in shown(range(FIRST, FIRST + OPERATORS), "operators"):
        chain = made(number)
        used.update(step.name for step in chain.steps)
        found, engine = examined(chain)
        engines[engine] += 1
        if found:
            failures.append("\n    ".join([str(chain), *found, smallest(chain)]))
            print(failures[-1], flush=True)
    assert not failures, "\n".join([f"{len(failures)} of {OPERATORS} operators are wrong:", *failures[:MOST_REPORTED]])
    if FIRST == 0 and len(TABLE) <= OPERATORS * TOGETHER:
        assert not TABLE.keys() - used.keys()
        assert engines["traced"] > OPERATORS / 8, engines


def test_the_table_is_large():
    assert len(TABLE) >= 130


def test_a_number_makes_the_same_chain_again():
    first, second = made(1234), made(1234)
    assert str(first) == str(second)
    x = first.domain
    assert torch.equal(coordinates(x), coordinates(second.domain))
    assert torch.equal(coordinates(call(first.function(), x)), coordinates(call(second.function(), x)))


def halved(A):
    return al.LinearOperator(A, lambda y: 0.5 * A.H(y), A.domain, A.codomain)


def conjugated(A):
    return al.LinearOperator(A, lambda y: A.H(y.conj()).conj(), A.domain, A.codomain)


def with_another_entry(A):
    return al.LinearOperator(lambda x: A(x).index_fill(0, torch.tensor([1]), 0), A.H, A.domain, A.codomain)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(halved, "A.H is wrong"), (conjugated, "A.H is wrong"), (with_another_entry, "A(x) is wrong"), (None, None)],
)
def test_a_wrong_operator_is_reported(change, expected):
    c = torch.randn(4, 3, dtype=torch.complex128)
    A, x = al.linear_operator(lambda x: c @ x, torch.zeros(3, dtype=c.dtype)), torch.randn(3, dtype=c.dtype)
    found = "\n".join(complaints(lambda x: c @ x, x, A if change is None else change(A), 10.0))
    assert (expected in found) if expected else not found


def test_wrong_complex_linearity_is_reported():
    x = torch.randn(3, dtype=torch.complex128)
    A = al.linear_operator(lambda x: 2 * x, x)
    assert "is_complex_linear is True, not False" in "\n".join(complaints(lambda x: 2 * x.conj(), x, A, 10.0))


def test_a_wrong_operation_is_reported_with_its_number():
    chain = made(7)
    chain.steps.append(Step("wrong", lambda x: x * x.sum(), 0))
    chain.shape = 0
    found, _ = examined(chain)
    assert found
    assert "FUZZ_FIRST=7" in str(chain)


def test_autograd_itself_may_be_another_map():
    def strided(x):
        scattered = torch.as_strided_scatter(x.new_zeros(2), x, (1,), (2,), 1)
        return torch.cat([x.new_ones(3), scattered]) - torch.cat([x.new_ones(3), x.new_zeros(2)])

    x = torch.ones(1, dtype=torch.float64)
    assert autograd_gap(strided, x) > 0.1
    assert autograd_gap(lambda x: 3 * x.flip(0), x) == 0
