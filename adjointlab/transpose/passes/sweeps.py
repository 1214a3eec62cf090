"""A step of a recurrence and its gradients, for two sweeps through time: nothing is computed in both, or too often.

The gradient of ``Re⟨S_θ u, v⟩`` in θ reads numbers that the step computes from u, its *residuals*. The sweep forwards
keeps these instead of u. Gradients are sums over time, and where that of a step is ``M g_t`` with an M that depends on
the state alone, ``Σ_t M g_t = M Σ_t g_t``: the sweep backwards adds up ``g_t``, and M is left for the end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import clean, dependents, known, merge, part, reached
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS, packet_of
from adjointlab.transpose.passes.at_point import is_product, memory, size
from adjointlab.transpose.passes.own_outputs import own_outputs

aten = torch.ops.aten
Copies = dict[fx.Node, fx.Node]

# Operations that are linear in two operands at once, in each of them, and in the first.
_SUMS = {aten.add, aten.sub}
_PRODUCTS = {aten.mul, aten.mm, aten.bmm, aten.mv}
_OF_FIRST = {*VIEWS, aten.neg, aten.clone, aten.select_backward, aten.slice_backward, aten.sum, aten.div} - {
    aten.as_strided
}


@dataclass(frozen=True)
class Sweeps:
    """A step as graphs of the two sweeps, and of what is left for the end."""

    forth: Graph  # (*state, *u, *i) → (*next u, *what is computed of the residuals)
    given: tuple[int, ...]  # leaves of u that are residuals themselves
    back: Graph  # (*state, *computed, *given, *i, *v, *sums) → (*Sᴴ v, *sums, *gradients in what moves)
    end: Graph  # (*state, *sums) → gradients in the rest of the state
    sums: tuple[Tensor, ...]  # fake ones


def sweeps(
    forward: Graph, adjoint: Graph, of_state: Graph, count: int, moving: Sequence[int], chosen: Sequence[int]
) -> Sweeps | None:
    """Return a step for sweeps that compute the chosen gradients in the state; None where one of them is not known.

    ``count`` is the number of leaves of u; ``moving`` are places of the state that hold another tensor at each step.
    """
    n, m = len(forward.state), len(forward.inputs)
    if any(of_state.outputs[i] is None for i in chosen):
        return None
    of_state = part(of_state, [of_state.outputs[i] for i in chosen])
    free = dependents(of_state.inputs[m:])
    if not free.issuperset(of_state.outputs):
        return None
    body, seen = fx.Graph(), dict[Hashable, fx.Node]()
    leaves = _placeholders(body, "given", forward.placeholders)
    images = dict(zip(forward.placeholders, leaves, strict=True))
    primals = dict(zip(of_state.placeholders, leaves, strict=False))
    merge(body, forward, images, seen, forward.outputs[:count])
    merge(body, of_state, primals, seen, [n for n in of_state.body.nodes if n not in free and n.op != "output"])
    residuals = _residuals(primals, free, leaves, n, n + count, moving)
    computed = [node for node in residuals if node not in leaves]
    given = [node for node in residuals if node in leaves]
    body.output((*[images[node] for node in forward.outputs[:count]], *computed))
    back, end, sums = _backwards(adjoint, of_state, primals, [*computed, *given], leaves[n + count :], moving, chosen)
    clean(body)
    forth = Graph(body, forward.state, forward.specialized)
    return Sweeps(forth, tuple(leaves.index(node) - n for node in given), back, end, sums)


def _residuals(
    primals: Copies, free: set[fx.Node], leaves: list[fx.Node], start: int, stop: int, moving: Sequence[int]
) -> list[fx.Node]:
    """Return what is to be kept of a step, which takes no more memory than its u, in ``leaves[start:stop]``."""
    read = {memory(copy) for node, copy in primals.items() if any(user in free for user in node.users)}
    varying = dependents([*leaves[start:], *(leaves[i] for i in moving)])
    known_later = {*leaves[:start], *leaves[stop:]}
    found = [node for node in leaves[0].graph.nodes if node in read and node in varying and node not in known_later]
    if size(found) <= size(leaves[start:stop]):
        return found
    needed = reached(found, lambda node: node.all_input_nodes)
    return [leaf for leaf in leaves[start:stop] if leaf in needed]


def _backwards(
    adjoint: Graph, of_state: Graph, primals: Copies, residuals: list[fx.Node], inputs: list[fx.Node],
    moving: Sequence[int], chosen: Sequence[int],
) -> tuple[Graph, Graph, tuple[Tensor, ...]]:  # fmt: skip
    n, body, seen = len(adjoint.state), fx.Graph(), dict[Hashable, fx.Node]()
    state = _placeholders(body, "state", adjoint.placeholders[:n])
    kept = _placeholders(body, "residual", residuals)
    given = _placeholders(body, "input", inputs)
    v = _placeholders(body, "v", adjoint.inputs)
    images = dict(zip(adjoint.placeholders, [*state, *v], strict=True))
    merge(body, adjoint, images, seen, adjoint.outputs)
    made = dict(zip([*residuals, *inputs], [*kept, *given], strict=True))
    copies = {node: made[copy] for node, copy in primals.items() if copy in made}
    copies |= zip(of_state.placeholders[:n], state, strict=True)
    copies |= zip(of_state.inputs[-len(v) :], v, strict=True)
    merge(body, of_state, copies, seen, of_state.outputs)
    gradients = [copies[node] for node in of_state.outputs]
    varying = dependents([*kept, *given, *v, *(state[i] for i in moving)])
    summed = [node for i, node in zip(chosen, gradients, strict=True) if i not in moving]
    terms = list(dict.fromkeys(term for node in summed for term in _terms(node, varying)))
    totals = _placeholders(body, "sum", terms)
    added = [_added(body, total, term) for total, term in zip(totals, terms, strict=True)]
    moved = [node for i, node in zip(chosen, gradients, strict=True) if i in moving]
    body.output((*[images[node] for node in adjoint.outputs], *added, *moved))
    last, ends = fx.Graph(), Copies()
    ends |= zip(state, _placeholders(last, "state", state), strict=True)
    ends |= zip(terms, _placeholders(last, "sum", terms), strict=True)
    whole = Graph(body, adjoint.state, adjoint.specialized)
    merge(last, whole, ends, {}, summed)
    last.output(tuple(ends[node] for node in summed))
    clean(body)
    end = own_outputs(Graph(last, adjoint.state, adjoint.specialized))
    return whole, end, tuple(term.meta["val"] for term in terms)


def _placeholders(body: fx.Graph, name: str, like: Sequence[fx.Node]) -> list[fx.Node]:
    return [known(body.placeholder(f"{name}_{i}"), node.meta["val"]) for i, node in enumerate(like)]


def _added(body: fx.Graph, total: fx.Node, term: fx.Node) -> fx.Node:
    """Add a term to a sum, at once where it is a product."""
    value = total.meta["val"]
    if is_product(term, value.dtype):
        return known(body.call_function(aten.addcmul.default, (total, *term.args)), value)
    return known(body.call_function(aten.add.Tensor, (total, term)), value)


def _terms(node: fx.Node, varying: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes in which another is linear, but for what does not vary; itself, where these are larger."""
    if not _is_linear(node, varying):
        return [node]
    operands = [operand for operand in node.all_input_nodes if operand in varying]
    found = list(dict.fromkeys(term for operand in operands for term in _terms(operand, varying)))
    return found if size(found) < 2 * size([node]) else [node]


def _is_linear(node: fx.Node, varying: set[fx.Node]) -> bool:
    """Return whether a node is linear in its operands that vary, all at once."""
    packet = packet_of(node)
    where = [position for position, a in enumerate(node.args) if isinstance(a, fx.Node) and a in varying]
    fits = where == [0, 1] if packet in _SUMS else len(where) == 1 if packet in _PRODUCTS else where == [0]
    if packet not in _SUMS | _PRODUCTS | _OF_FIRST or not fits:
        return False
    dtypes = {n.meta["val"].dtype for n in (node, *(node.args[i] for i in where))}  # type: ignore[union-attr]
    return len(dtypes) == 1
