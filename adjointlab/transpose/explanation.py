"""The account in words that ``A.explain()`` prints: how an adjoint was derived, and why so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.passes.fuse_slices import accumulate


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
        asked = "" if self.requested == "auto" else f" (asked for: {self.requested})"
        lines = [f"engine: {self.engine}{asked}"]
        if self.reason:
            lines.append(f"reason: {self.reason}")
        if self.path:
            lines.append(f"eager adjoint: torch.autograd.grad, since {self.path}")
        if self.readers is None:
            lines.append("evidence of linearity: numerical only, there is no graph")
        elif self.readers:
            where = ", ".join(self.readers)
            lines.append(f"evidence of linearity: numerical only, the derivative reads the input in {where}")
        else:
            lines.append("evidence of linearity: the derivative does not read the input")
        if self.hidden:
            lines.append(f"the forward has {', '.join(self.hidden)}: there, autograd's word is no proof")
        if self.autograd_gap is not None:
            lines.append(f"autograd's own adjoint differs by {self.autograd_gap:.1e} of its norm")
        if self.is_stateful:
            lines.append("a call of the forward changes Python state that it reads, which is taken not to matter")
        if self.partly:
            lines.append(
                "watched: tensors, and what modules hold (training, attributes, submodules); call A.refresh() after "
                f"any other change of Python state, since PyTorch's front end refuses the function ({self.partly})"
            )
        if self.program:
            before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
            removed = self.ops_before - self.ops_after
            lines.append(f"ops: {before} in the vector-Jacobian product, {after} in the adjoint")
            if removed:
                lines.append("removed: " + ", ".join(f"{name} ×{n}" for name, n in sorted(removed.items())))
        lines.extend(f"kernel: {kernel}" for kernel in self.kernels)
        if self.program:
            lines += ["adjoint program:", *("    " + line for line in self.program.splitlines())]
        return "\n".join(lines)

    __repr__ = __str__


def listing(graph: Graph) -> str:
    """Return a graph as a readable program, one op a line with the shape of its result."""
    names = {p: s.name for p, s in zip(graph.placeholders, graph.state, strict=False)}
    inputs = graph.inputs
    for index, node in enumerate(inputs):
        names[node] = "v" if len(inputs) == 1 else f"v{index}"
    lines: list[str] = []
    for node in graph.body.nodes:
        if "stands_for" in node.meta:
            names[node] = f"shape{node.meta['stands_for']}"
        elif node.op == "call_function":
            names[node] = f"t{len(lines)}"
            if op_name(node.target) == "getitem":
                lines.append(f"{names[node]} = {names[node.args[0]]}[{node.args[1]}]")
                continue
            if node.target is accumulate:
                sources, pieces = _show(node.args[0], names), len(node.args[1])
                lines.append(f"{names[node]} = accumulate({sources}, {pieces} pieces)  # {tuple(node.args[2])}")
                continue
            options = (f"{name}={value}" for name, value in node.kwargs.items())
            arguments = ", ".join([*(_show(a, names) for a in node.args), *options])
            value = node.meta.get("val")
            shape = f"  # {tuple(value.shape)}" if hasattr(value, "shape") else ""
            lines.append(f"{names[node]} = {op_name(node.target)}({arguments}){shape}")
    outputs = ", ".join(_show(node, names) for node in graph.outputs)
    return "\n".join([*lines, f"return {outputs}"])


def _show(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(item, names) for item in value) + "]"
    return names[value] if isinstance(value, fx.Node) else str(value).replace("torch.", "")
