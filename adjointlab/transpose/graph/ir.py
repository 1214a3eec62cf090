"""A functional program on tensors, and what can be read off it: what cuts it off, what shares memory, what is dead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from adjointlab.modules import Source


@dataclass(frozen=True)
class Graph:
    """A functional program on tensors: ``function(*state, *inputs) → tuple of outputs``.

    ``specialized`` are the tensors whose values became Python numbers while tracing, with those values: the graph is
    out of date once one differs.
    """

    body: fx.Graph
    state: tuple[Source, ...]
    specialized: tuple[tuple[Source, Tensor], ...] = ()

    @property
    def placeholders(self) -> list[fx.Node]:
        """Return the input nodes: those of the state first."""
        return [node for node in self.body.nodes if node.op == "placeholder"]

    @property
    def inputs(self) -> list[fx.Node]:
        """Return the input nodes that are not state."""
        return self.placeholders[len(self.state) :]

    @property
    def outputs(self) -> list[fx.Node]:
        """Return the output values, as nodes; None for what is not computed."""
        return list(self.body.output_node().args[0])  # type: ignore[arg-type]

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The graph as a plain function, once it is no more changed."""
        return compiled(self.body)


def compiled(body: fx.Graph) -> Callable[..., Any]:
    """Return a graph as a plain function, with a code object of its own: torch.compile counts recompilations by code.

    No ``GraphModule`` is made, which would keep the source for ever.
    """
    made = body.python_code("self")
    scope = dict(made.globals)
    exec(compile(made.src, "<adjointlab program>", "exec"), scope)  # as fx itself does
    function = scope["forward"]

    def run(*tensors: Tensor) -> Any:
        return function(None, *tensors)

    run.__code__ = run.__code__.replace(co_name="program")
    return run
