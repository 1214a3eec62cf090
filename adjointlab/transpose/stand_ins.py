"""Operations of our own that stand in, while a map is traced for a file, for some that cannot be traced as they are.

Those are products with a CSR matrix, for a tensor of that layout is no constant of a program, and some whose shape
PyTorch does not know, in all of its versions or (transforms of real numbers) in the older ones. The operations
themselves are put back when the program is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab import compat
from adjointlab.errors import NotExportableError

aten = torch.ops.aten


@torch.library.custom_op(
    "adjointlab::csr_product",
    mutates_args=(),
    schema="(Tensor start, Tensor column, Tensor value, int columns, Tensor x) -> Tensor",
)
def _csr_product(start: Tensor, column: Tensor, value: Tensor, columns: int, x: Tensor) -> Tensor:
    rows = start.shape[0] - 1
    return torch.sparse_csr_tensor(start, column, value, (rows, columns), check_invariants=False) @ x


@_csr_product.register_fake
def _(start: Tensor, column: Tensor, value: Tensor, columns: int, x: Tensor) -> Tensor:
    return x.new_empty(start.shape[0] - 1, *x.shape[1:])


def _convolved(x: Tensor, weight: Tensor, bias: Any, padding: Any, stride: Any, dilation: Any, groups: int) -> Tensor:
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _half(x: Tensor, dims: list[int], norm: int, onesided: bool) -> Tensor:
    shape = [n // 2 + 1 if d == dims[-1] and onesided else n for d, n in enumerate(x.shape)]
    return x.new_empty(shape, dtype=x.dtype.to_complex())


def _whole(x: Tensor, dims: list[int], norm: int, last: int) -> Tensor:
    shape = [last if d == dims[-1] else n for d, n in enumerate(x.shape)]
    return x.new_empty(shape, dtype=x.dtype.to_real())


def _complex_whole(x: Tensor, dims: list[int], norm: int, forward: bool) -> Tensor:
    return x.new_empty(x.shape)


# Operations with what stands in for them: the arguments, and the function that tells the shape of the result.
_OPERATIONS: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    aten.mkldnn_convolution.default: (
        "Tensor x, Tensor weight, Tensor? bias, int[] padding, int[] stride, int[] dilation, int groups", _convolved,
    ),
    aten._fft_r2c.default: ("Tensor x, int[] dim, int normalization, bool onesided", _half),
    aten._fft_c2c.default: ("Tensor x, SymInt[] dim, int normalization, bool forward", _complex_whole),
    aten._fft_c2r.default: ("Tensor x, int[] dim, int normalization, SymInt last_dim_size", _whole),
}  # fmt: skip


def _made(op: Any, arguments: str, shape: Callable[..., Tensor]) -> Any:
    name = op.overloadpacket.__name__
    made = torch.library.custom_op(f"adjointlab::{name}", op, mutates_args=(), schema=f"({arguments}) -> Tensor")
    made.register_fake(shape)
    return getattr(torch.ops.adjointlab, name).default


_STAND_INS = {op: _made(op, *how) for op, how in _OPERATIONS.items()}
_BEHIND = {stand_in: op for op, stand_in in _STAND_INS.items()}


class StandingIn(compat.TorchDispatchMode):
    """Run the operations that stand in for those which cannot be traced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sparse = [a for a in compat.pytree.tree_leaves((args, kwargs)) if _is_sparse(a)]
        if sparse:
            return _sparse_product(func, *args, **kwargs)
        if func is aten.mkldnn_convolution.default:
            x, weight, bias, padding, stride, dilation, groups = args
            settings = stride, padding, dilation, False, [0] * len(stride), groups
            with compat._disable_current_modes():
                by_itself = compat.takes_onednn(x, weight, bias, *settings)
            if by_itself:  # which more can read
                return aten.convolution.default(x, weight, bias, *settings)
        return _STAND_INS.get(func, func)(*args, **kwargs)


def _is_sparse(a: Any) -> bool:
    return isinstance(a, Tensor) and a.layout is not torch.strided


def _sparse_product(func: Any, matrix: Tensor, x: Any = None, *, out: Tensor | None = None) -> Tensor:
    if func.overloadpacket not in {aten.mv, aten.mm, aten._sparse_mm} or _is_sparse(x) or not _is_sparse(matrix):
        raise NotExportableError(
            f"expected products of sparse matrices with vectors, got {func}, for which a program has no form: "
            "write the map with dense tensors"
        )
    with compat._disable_current_modes():  # its parts are constants
        rows = matrix if matrix.layout is torch.sparse_csr else matrix.to_sparse_csr()
        parts = rows.crow_indices(), rows.col_indices(), rows.values()
    found: Tensor = torch.ops.adjointlab.csr_product(*parts, matrix.shape[1], x)
    return found if out is None else out.copy_(found)


_COPIED = aten.clone.default, {"memory_format": torch.contiguous_format}


def finish(program: Any, *, copies: bool) -> None:
    """Put the operations themselves into an exported program, and have its inputs be as they were when it was traced.

    They are to be contiguous, of their dtype, and with ``copies`` at the start of their memory.
    """
    graph: fx.Graph = program.graph
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)  # lines of our own, with the paths of this machine
        if node.target is torch.ops.adjointlab.csr_product.default:
            start, column, value, columns, x = node.args
            rows, dtype = node.meta["val"].shape[0], value.meta["val"].dtype
            with graph.inserting_before(node):
                made = (start, column, value, [rows, columns])
                layout = {"dtype": dtype, "layout": torch.sparse_csr, "device": value.meta["val"].device}
                matrix = graph.call_function(aten._sparse_csr_tensor_unsafe.default, made, layout)
            # A dense one of its shape: a file has no place for a sparse one.
            matrix.meta["val"] = value.meta["val"].new_empty(rows, columns)
            node.target = aten.mv.default if x.meta["val"].ndim == 1 else aten.mm.default
            node.args = (matrix, x)
        node.target = _BEHIND.get(node.target, node.target)
    given = set(program.graph_signature.user_inputs)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.name in given]
    after = next(node for node in graph.nodes if node.op != "placeholder")
    for node in inputs:
        _received(graph, node, after, copies=copies)
    graph.lint()
    program.graph_module.recompile()


def _received(graph: fx.Graph, node: fx.Node, after: fx.Node, *, copies: bool) -> None:
    """Have an input checked and brought into its usual form, before anything else reads it."""
    value = node.meta["val"]
    users = [user for user in node.users if user.op != "output" and user.target is not aten.sym_size.int]
    with graph.inserting_before(after):
        graph.call_function(aten._assert_tensor_metadata.default, (node, None, None, value.dtype)).meta["val"] = None
        last = node
        steps: list[tuple[Any, dict[str, Any]]] = [(aten.resolve_conj.default, {})] if value.dtype.is_complex else []
        steps += [_COPIED if copies else (aten.contiguous.default, {})]
        for op, kwargs in steps:
            last = graph.call_function(op, (last,), kwargs)
            last.meta["val"] = value
    for user in users:
        user.replace_input_with(node, last)
