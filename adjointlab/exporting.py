"""Export: a map as a file of PyTorch's own operations, with the kernels that were chosen for it."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from adjointlab.affine import AffineOperator
from adjointlab.blocks import diagonal_entries
from adjointlab.errors import NotExportableError, SpaceMismatchError
from adjointlab.least_squares import LeastSquares
from adjointlab.numerics import UNITS, allowance, eps_of, relative_gap
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.tree import map_leaves


def export(
    map: LinearOperator[Any, Any] | AffineOperator[Any, Any] | Callable[[Any], Any],
    path: str | os.PathLike[str],
    *,
    batch: tuple[int, int] | None = None,
) -> None:
    """Write ``x ↦ Ax`` as a program of PyTorch that runs without adjointlab, with the kernels that were chosen for A.

    ``torch.export.load(path).module()`` is the map. All that it depends on is in the file with its values of now:
    weights, what is computed from them once, such as a kernel's Fourier transform, and the data of a gradient. The
    file is loaded and compared with the map before it takes its place.

    Parameters
    ----------
    map : LinearOperator, AffineOperator, or method ``gradient`` of LeastSquares
        ``A``, ``A.H``, an affine f, a Jacobian, or ``F.gradient``.
    path : str or path
        The file, which ends with ``.pt2``. One that is there is replaced.
    batch : (int, int), optional
        The smallest and largest size of the free dimensions, where there are any, as ``batch_dims=1`` declares one.
        The program then takes every size between; without it, that of the domain alone. That of ``F.gradient`` takes
        pairs ``(x, y)``, with the data; F, its weight and penalties, of one problem, are those of each.

    Raises
    ------
    NotExportableError
        If the map has no program: it runs Python code of its own, goes through NumPy, or needs one for each size.
    SpaceMismatchError
        If ``map`` is no such map, or ``batch`` does not fit it.
    ValueError
        If the path does not end with ``.pt2``.
    FileNotFoundError
        If the folder of the path does not exist.

    Examples
    --------
    >>> import tempfile, torch
    >>> from adjointlab import linear_operator
    >>> c = torch.nn.Conv2d(1, 1, 11, padding=5, padding_mode="circular", bias=False)
    >>> A = linear_operator(c, (1, 1, 32, 32), batch_dims=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(A.H, f"{folder}/adjoint.pt2", batch=(1, 64))
    ...     adjoint = torch.export.load(f"{folder}/adjoint.pt2").module()
    >>> y = torch.randn(5, 1, 32, 32)
    >>> torch.allclose(adjoint(y), A.H(y), atol=1e-4)
    True
    """
    file = Path(path)
    domain = _domain(map)
    if file.suffix != ".pt2":
        raise ValueError(f"expected a path that ends with .pt2, the kind of file that torch.export writes, got {path}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"expected a path in a folder that exists, got {path}: make {file.parent} first")
    _require_sizes(map, domain, batch)
    if batch is not None and (F := _objective(map)) is not None:
        map, domain = _of_data(F)
    from adjointlab.transpose.exported import Fixed  # which registers operations with PyTorch

    fixed = Fixed(is_free=batch is not None)
    part = file.with_name(f".{file.stem}.{os.getpid()}.part.pt2")
    try:
        with domain.without_autocast():
            program = _program(map, domain, batch, fixed)
            _save(program, part)
            _require_same(torch.export.load(part).module(), map, domain, batch, fixed)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _objective(map: Any) -> LeastSquares[Any, Any] | None:
    """Return F where a map is its gradient."""
    owner = getattr(map, "__self__", None)
    is_gradient = isinstance(map, types.MethodType) and map.__name__ == "gradient"
    return owner if is_gradient and isinstance(owner, LeastSquares) else None


def _domain(map: Any) -> Space[Any]:
    if (F := _objective(map)) is not None:
        found: Space[Any] = F.A.domain
    elif isinstance(map, (LinearOperator, AffineOperator)):
        found = map.domain
    else:
        raise SpaceMismatchError(
            f"expected an operator, as A and A.H are, or the method gradient of a LeastSquares, got "
            f"{type(map).__name__}: wrap a module or function with al.linear_operator"
        )
    if found.is_sharded or found.structure.holders:
        kind = "distributed over processes" if found.is_sharded else "with tensors in objects of a class of its own"
        raise NotExportableError(f"expected a domain of tensors, tuples, lists and dictionaries, got one {kind}")
    return found


def _require_sizes(map: Any, domain: Space[Any], batch: Any) -> None:
    if batch is None:
        return
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(type(n) is int for n in batch)):
        raise SpaceMismatchError(f"expected batch=(smallest, largest), two sizes, got {batch!r}")
    if not 1 <= batch[0] < batch[1]:
        raise SpaceMismatchError(f"expected batch=(smallest, largest) with 1 ≤ smallest < largest, got {batch!r}")
    if not domain.batch_dims:
        raise SpaceMismatchError(
            f"expected a map with free dimensions for batch={batch!r}, got one of fixed sizes: build it with "
            "batch_dims=1"
        )
    if (F := _objective(map)) is not None and set(F.batch_shape) != {1}:
        raise SpaceMismatchError(
            f"expected the gradient of one problem for batch={batch!r}, got data of the batch sizes "
            f"{F.batch_shape}: build F with data of batch size 1, the program takes those of any size"
        )


def _of_data(F: LeastSquares[Any, Any]) -> tuple[Callable[[Any], Any], Space[Any]]:
    """Return ``(x, y) ↦ Aᴴ W (Ax − y) + …`` for batches of problems like F, and the space of the pairs."""
    k = F.domain.batch_dims

    def repeated(size: tuple[int, ...], element: Any) -> Any:
        return map_leaves(lambda leaf: leaf.expand(*size, *leaf.shape[k:]), element)

    @functools.cache
    def of(size: tuple[int, ...]) -> LeastSquares[Any, Any]:
        entries, penalties = None if F.weight is None else diagonal_entries(F.weight), []
        for part in F.penalties:
            strength, b = part.strength, part.b
            each = strength.expand(size) if isinstance(strength, Tensor) and strength.ndim else strength
            penalties.append((each, part.L, *([] if b is None else [repeated(size, b)])))
        weight = F.weight if entries is None else repeated(size, entries)
        return LeastSquares(F.A, repeated(size, F.y), weight, penalties)

    def gradient(pair: Any) -> Any:
        return of(tuple(F.domain.leaves(pair[0])[0].shape[:k])).gradient_for(*pair)

    return gradient, Space.of((F.A.domain.plain, F.A.codomain.plain), batch_dims=k)


class _Structured(nn.Module):
    """A graph of leaves as a module from elements to elements."""

    def __init__(self, graph: fx.GraphModule, domain: Space[Any], result: Space[Any]) -> None:
        from adjointlab.transpose.exported import lifted

        super().__init__()
        self._function, constants = lifted(graph)
        self._domain, self._result = domain, result
        for index, constant in enumerate(constants):
            self.register_buffer(f"constant_{index}", constant)

    def forward(self, x: Any) -> Any:
        leaves = self._domain.structure.leaves(x)
        assert leaves is not None
        return self._result.unflatten(self._function(*self._buffers.values(), *leaves))


def _program(map: Any, domain: Space[Any], batch: tuple[int, int] | None, fixed: Any) -> Any:
    """Return the exported program of a map."""
    from adjointlab.transpose.exported import SIZES, corners, reads_memory, traced, unified
    from adjointlab.transpose.stand_ins import finish

    k = domain.batch_dims
    structure: list[Space[Any]] = []

    def of_leaves(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result = map(domain.unflatten(leaves))
        structure.append(Space.of(result))
        return structure[-1].leaves(result)

    sizes = [domain.batch_shape] if batch is None else corners(k)
    modules = [traced(of_leaves, _random(domain.with_batch(size)), fixed) for size in sizes]
    graph = modules[0] if batch is None else unified(modules, k)
    dims: Any = None
    if batch is not None:
        free = {i: torch.export.Dim(f"batch_{i}" if k > 1 else "batch", min=batch[0], max=batch[1]) for i in range(k)}
        dims = (domain.unflatten([free for _ in domain.specs]),)
    # In the range, and each another one: torch.export takes sizes that are equal there to be equal always.
    shown = sizes[0] if batch is None else tuple(min(batch[1], max(batch[0], SIZES[0]) + i) for i in range(k))
    example = domain.with_batch(shown).zeros()
    try:
        program = torch.export.export(
            _Structured(graph, domain, structure[0]), (example,), dynamic_shapes=dims, strict=False
        )
    except RuntimeError as error:
        sizes_or_one = "every size" if batch else "its size"
        raise NotExportableError(f"expected a map that torch.export takes for {sizes_or_one}, but: {error}") from error
    finish(program, copies=reads_memory(graph))
    return program


def _save(program: Any, file: Path) -> None:
    try:
        torch.export.save(program, file)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NotExportableError(
            f"expected a map that torch.export.save can write, but: {lines[0]} {lines[-1]}"
        ) from error


def _random(space: Space[Any], seed: int = 0) -> tuple[Tensor, ...]:
    return space.leaves(space.randn(torch.Generator().manual_seed(seed)))


def _require_same(program: Any, map: Any, domain: Space[Any], batch: tuple[int, int] | None, fixed: Any) -> None:
    """Raise unless a program that was loaded computes what the map does, at other random elements."""
    sizes = [] if batch is None else _tried(*batch)
    for space in [domain] if batch is None else [domain.with_batch((n,) * domain.batch_dims) for n in sizes]:
        x = space.unflatten(_random(space, seed=1))
        with torch.no_grad():
            found = program(x)
            if batch is None:
                expected = map(x)
            else:  # by programs of its own, which do not take the place of those in use
                with fixed.in_use():
                    expected = map(x)
        leaves = _leaves(expected), _leaves(found)
        gap = relative_gap(*leaves)
        if not gap <= allowance(UNITS, eps_of(leaves[0])):
            raise NotExportableError(
                f"expected a program that computes what the map does, got one that is off by {gap:.1e} of the result: "
                "the map depends on something that is no tensor, or leaves PyTorch on its way"
            )


def _tried(smallest: int, largest: int) -> list[int]:
    """Return sizes at which a program is tried: the smallest, and one more; at least one at which it was not traced."""
    from adjointlab.transpose.exported import SIZES

    found = {smallest, min(largest, max(smallest, *SIZES))}
    return sorted(found if found.difference(SIZES) else {smallest, largest})


def _leaves(element: Any) -> Sequence[Tensor]:
    return Space.of(element).leaves(element)
