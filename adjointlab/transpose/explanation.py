"""The account in words that ``A.explain()`` prints: how an adjoint was derived, and why so."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.passes.fuse_slices import accumulate, windows


@dataclass(frozen=True)
class Explanation:
    """How an adjoint was derived."""

    engine: str
    requested: str
    reason: str = ""  # why the engine is not the one that was wanted
    path: str = ""  # why the eager adjoint is not by torch.func.vjp, where that is so
    readers: tuple[str, ...] | None = None  # operations of the adjoint that read the primal; None without a graph
    ops_before: Counter[str] = field(default_factory=Counter)  # of the vector-Jacobian product
    ops_after: Counter[str] = field(default_factory=Counter)  # of the adjoint
    kernels: tuple[str, ...] = ()  # a line on each convolution
    cut: str = ""  # an operation of the forward that cuts its input off from autograd
    hidden: tuple[str, ...] = ()  # what hides values from autograd, or has a backward of its own
    partly: str = ""  # why Python state is watched in part only
    autograd_gap: float | None = None  # how far autograd's adjoint is from this one, of its norm, where compared
    is_stateful: bool = False  # whether a call was seen to change Python state that the forward reads
    is_kept: bool = False  # whether a pull-back of autograd serves several calls
    program: str = ""  # the adjoint

    @property
    def independent(self) -> bool:
        """Whether the derivative was seen not to read the input: the map is affine."""
        return self.readers == ()

    @property
    def is_evident(self) -> bool:
        """Whether the graph shows all that the function does: nothing reads the input, or hides it from autograd."""
        return self.independent and not self.cut and not self.hidden and not self.is_stateful

    def __str__(self) -> str:
        evidence = "numerical only, there is no graph"
        if self.readers is not None:
            read = f"numerical only, the derivative reads the input in {', '.join(self.readers)}"
            evidence = read if self.readers else "the derivative does not read the input"
        before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
        removed = ", ".join(f"{name} ×{n}" for name, n in sorted((self.ops_before - self.ops_after).items()))
        lines = [
            f"engine: {self.engine}" + ("" if self.requested == "auto" else f" (asked for: {self.requested})"),
            self.reason and f"reason: {self.reason}",
            self.path and f"eager adjoint: torch.autograd.grad, since {self.path}",
            f"evidence of linearity: {evidence}",
            self.hidden and f"the forward has {', '.join(self.hidden)}: there, autograd's word is no proof",
            self.autograd_gap is not None and f"autograd's own adjoint differs by {self.autograd_gap:.1e} of its norm",
            self.is_stateful
            and "a call of the forward changes Python state that it reads, which is taken not to matter",
            self.partly
            and "watched: tensors, what modules hold (training, attributes, submodules), and what the function names; "
            "call A.refresh() after "
            f"any other change of Python state, since PyTorch's front end refuses the function ({self.partly})",
            self.is_kept
            and "pull-back: kept while tensors, what modules hold (training, attributes, submodules), and what the "
            "function names are as they were; call A.refresh() after any other change of Python state",
            self.program and f"ops: {before} in the vector-Jacobian product, {after} in the adjoint",
            self.program and removed and f"removed: {removed}",
            *(f"kernel: {kernel}" for kernel in self.kernels),
            self.program and "adjoint program:\n" + textwrap.indent(self.program, "    "),
        ]
        return "\n".join(line for line in lines if line)

    __repr__ = __str__


def listing(graph: Graph) -> str:
    """Return a graph as a readable program, one op a line with the shape of its result."""
    names = {p: s.name for p, s in zip(graph.placeholders, graph.state, strict=False)}
    inputs = graph.inputs
    names |= {node: "v" if len(inputs) == 1 else f"v{index}" for index, node in enumerate(inputs)}
    lines: list[str] = []
    for node in graph.body.nodes:
        if "stands_for" in node.meta:
            names[node] = f"shape{node.meta['stands_for']}"
        elif node.op == "call_function":
            names[node] = f"t{len(lines)}"
            lines.append(f"{names[node]} = {_expression(node, names)}")
    outputs = ", ".join(_show(node, names) for node in graph.outputs)
    return "\n".join([*lines, f"return {outputs}"])


def _expression(node: fx.Node, names: dict[fx.Node, str]) -> str:
    name, arguments = op_name(node.target), [_show(a, names) for a in node.args]
    if name == "getitem":
        return f"{arguments[0]}[{arguments[1]}]"
    if node.target in {accumulate, windows}:
        arguments[1:] = [f"{len(node.args[1])} pieces"]  # type: ignore[arg-type]
    options = [f"{option}={given}" for option, given in node.kwargs.items()]
    value: Any = node.meta.get("val")
    shape = f"  # {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{name}({', '.join([*arguments, *options])}){shape}"


def _show(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(item, names) for item in value) + "]"
    return names[value] if isinstance(value, fx.Node) else str(value).replace("torch.", "")
