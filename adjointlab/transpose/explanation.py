"""The account in words that ``A.explain()`` prints: how an adjoint was derived, and why so."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from adjointlab.transpose.cost import cost
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.passes.convolutions import kernels_of
from adjointlab.transpose.passes.fuse_slices import accumulate, windows
from adjointlab.transpose.passes.partition import kept_nodes


@dataclass(frozen=True)
class Account:
    """Facts about the program of A, or that of Aᴴ, known without running it."""

    graph: Graph
    is_lowered: bool
    kept: Callable[[], int]  # the bytes that it keeps between calls by now

    @property
    def kernels(self) -> tuple[str, ...]:
        """A line on each convolution and each map by index."""
        return kernels_of(self.graph) if self.is_lowered else ()

    @property
    def cost(self) -> str:
        """The expected cost of a call, in words."""
        work, moved = cost(self.graph)
        return f"about {_short(work).strip()} operations a call, and {_short(moved)}B read and written"


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
    cut: str = ""  # an operation of the forward that cuts its input off from autograd
    hidden: tuple[str, ...] = ()  # what hides values from autograd, or has a backward of its own
    selected: str = ""  # the rows of the result that are computed, where these are not all
    whole: tuple[str, ...] = ()  # operations that are computed for all rows, nevertheless
    partly: str = ""  # why Python state is watched in part only
    autograd_gap: float | None = None  # how far autograd's adjoint is from this one, of its norm, where compared
    repeats: str = ""  # what to write instead of a loop, where the forward is one
    is_stateful: bool = False  # whether a call was seen to change Python state that the forward reads
    is_kept: bool = False  # whether a pull-back of autograd serves several calls
    programs: tuple[Account, Account] | None = None  # of A and Aᴴ

    @property
    def independent(self) -> bool:
        """Whether the derivative was seen not to read the input: the map is affine."""
        return self.readers == ()

    @property
    def is_evident(self) -> bool:
        """Whether the graph shows all that the function does: nothing reads the input, or hides it from autograd."""
        return self.independent and not self.cut and not self.hidden and not self.is_stateful

    def account(self, *, adjoint: bool, letter: str = "A") -> str:
        """Return the account of A or of Aᴴ."""
        return "\n".join([*self._origin(), *self._of_programs((letter, f"{letter}ᴴ"), adjoint=adjoint)])

    def _origin(self) -> list[str]:
        evidence = "numerical only, there is no graph"
        if self.readers is not None:
            read = f"numerical only, the derivative reads the input in {', '.join(self.readers)}"
            evidence = read if self.readers else "the derivative does not read the input"
        lines = [
            f"engine: {self.engine}" + ("" if self.requested == "auto" else f" (asked for: {self.requested})"),
            self.reason and f"reason: {self.reason}",
            self.repeats,
            self.path and f"eager adjoint: torch.autograd.grad, since {self.path}",
            f"evidence of linearity: {evidence}",
            self.selected and self._rows(),
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
        ]
        return [line for line in lines if line]

    def _rows(self) -> str:
        if self.engine == "eager":
            return f"{self.selected}: selected from the whole result"
        if self.whole:
            return f"{self.selected}: computed by themselves, but for what is computed whole: {', '.join(self.whole)}"
        return f"{self.selected}: computed by themselves"

    def _of_programs(self, names: tuple[str, str], *, adjoint: bool) -> list[str]:
        if self.programs is None:
            return []
        before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
        removed = ", ".join(f"{name} ×{n}" for name, n in sorted((self.ops_before - self.ops_after).items()))
        own = dict(list(zip(names, self.programs, strict=True))[1 if adjoint else 0 :])
        memory = [f"{_short(program.kept())}B for {name}" for name, program in own.items()]
        kernels = dict.fromkeys(kernel for program in own.values() for kernel in program.kernels)
        title = f"program of {names[1]}, whose own adjoint is {names[0]}" if adjoint else "adjoint program"
        return [
            f"ops: {before} in the vector-Jacobian product, {after} in the adjoint",
            *([f"removed: {removed}"] if removed else []),
            *(f"kernel: {kernel}" for kernel in kernels),
            *(f"cost of {name}: {program.cost}" for name, program in own.items()),
            f"memory kept between calls: {', '.join(memory)}",
            f"{title}:\n{textwrap.indent(listing(self.programs[1].graph), '    ')}",
        ]


def _short(number: int) -> str:
    """Return a number with its prefix, as 1.3 M."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number} "


def listing(graph: Graph) -> str:
    """Return a graph as a readable program, one op a line with the shape of its result."""
    kept = kept_nodes(graph)
    names = {p: s.name for p, s in zip(graph.placeholders, graph.state, strict=False)}
    inputs = graph.inputs
    names |= {node: "v" if len(inputs) == 1 else f"v{index}" for index, node in enumerate(inputs)}
    lines: list[str] = []
    for node in graph.body.nodes:
        if "stands_for" in node.meta:
            names[node] = f"shape{node.meta['stands_for']}"
        elif node.op == "call_function":
            names[node] = f"t{len(lines)}"
            remark = "kept between calls" if node in kept else _size(node)
            lines.append(f"{names[node]} = {_expression(node, names)}" + (f"  # {remark}" if remark else ""))
    outputs = ", ".join(_show(node, names) for node in graph.outputs)
    return "\n".join([*lines, f"return {outputs}"])


def _expression(node: fx.Node, names: dict[fx.Node, str]) -> str:
    name, arguments = op_name(node.target), [_show(a, names) for a in node.args]
    if name == "getitem":
        return f"{arguments[0]}[{arguments[1]}]"
    if node.target in {accumulate, windows}:
        arguments[1:] = [f"{len(node.args[1])} pieces"]  # type: ignore[arg-type]
    options = [f"{option}={given}" for option, given in node.kwargs.items()]
    return f"{name}({', '.join([*arguments, *options])})"


def _size(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    return str(tuple(value.shape)) if hasattr(value, "shape") else ""


def _show(value: object, names: dict[fx.Node, str]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(item, names) for item in value) + "]"
    return names[value] if isinstance(value, fx.Node) else str(value).replace("torch.", "")
