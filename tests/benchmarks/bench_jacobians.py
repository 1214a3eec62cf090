"""Jacobians at a point, against `torch.func.linearize` and a pull-back that autograd keeps: five models.

mrpro's `Jacobian` and curvlinops' `JacobianLinearOperator` take part where they are installed: the first in a real or
complex tensor, the second in the parameters of a module, which is made of a model here.

The operators are called within `frozen()`, as solvers call them. A *new point* is `J.at(x1)` with one `J(d)` and one
`J.H(v)`, of which the time of both alone is taken off, in multiples of a call of the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contenders import Ways, assert_equal, imported
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al

Model = tuple[Callable[..., Any], Any]


def phase_retrieval(n: int) -> Model:
    """Return the magnitudes of four masked spectra, as a function of the phase."""
    masks = torch.exp(2j * torch.pi * torch.rand(4, n, n))
    return lambda x: torch.fft.fft2(masks * torch.exp(1j * x)).abs().square(), torch.rand(n, n)


class SmallUNet(nn.Module):
    """Two scales, `c` channels on the fine one."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(c, 2 * c, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * c, 2 * c, 3, padding=1))
        self.up = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(2 * c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.last(torch.cat([fine, self.up(F.relu(self.coarse(F.max_pool2d(fine, 2))))], 1))


def network(n: int) -> Model:
    """Return a small U-Net as a function of its parameters."""
    net, image = SmallUNet(16).requires_grad_(False), torch.rand(1, 1, n, n)
    return lambda p: torch.func.functional_call(net, p, (image,)), dict(net.named_parameters())


def signal(n: int) -> Model:
    """Return eight echoes of an MRI signal, as a function of density and relaxation times."""
    t = torch.linspace(0.1, 3, 8)[:, None, None]
    maps = {name: torch.rand(n, n) + 0.5 for name in ("rho", "t1", "t2")}
    return lambda m: m["rho"] * torch.exp(-t / m["t2"]) * (1 - torch.exp(-1 / m["t1"])), maps


def registration(n: int) -> Model:
    """Return a warped image, as a function of displacements."""
    image = torch.rand(1, 1, n, n)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, 1, n, n), align_corners=False)
    return lambda d: F.grid_sample(image, grid + d, align_corners=False), 0.01 * torch.rand(1, n, n, 2)


def reaction_diffusion(n: int) -> Model:
    """Return the state after 20 steps, as a function of the first."""

    def laplacian(z: Tensor) -> Tensor:
        around = z.roll(1, 0) + z.roll(-1, 0) + z.roll(1, 1) + z.roll(-1, 1)
        return around - 4 * z

    def run(state: Tensor) -> Tensor:
        u, v = state
        for _ in range(20):
            r = u * v * v
            u, v = u + 0.1 * laplacian(u) - r + 0.03 * (1 - u), v + 0.05 * laplacian(v) + r - 0.09 * v
        return torch.stack([u, v])

    return run, torch.rand(2, n, n)


MODELS = {
    "phase retrieval": (phase_retrieval, 128),
    "U-Net in its parameters": (network, 64),
    "MRI signal": (signal, 128),
    "registration": (registration, 128),
    "reaction–diffusion, 20 steps": (reaction_diffusion, 128),
}


class Setup:
    """A model with its Jacobian, and what others make of it."""

    def __init__(self, name: str, *, quick: bool) -> None:
        make, n = MODELS[name]
        self.f, self.x = make(16 if quick else n)
        self.J = al.jacobian(self.f, self.x)
        self.d, self.v = self.J.domain.randn(), self.J.codomain.randn()
        self.leaves = [leaf.clone().requires_grad_() for leaf in self.J.domain.leaves(self.x)]
        with torch.enable_grad():
            self.outputs = pytree.tree_leaves(self.flat(*self.leaves))
        self.case = f"{name}, {16 if quick else n}²"

    def flat(self, *leaves: Tensor) -> Any:
        return self.f(self.J.domain.unflatten(leaves))

    def pull_back(self) -> Any:
        return torch.autograd.grad(self.outputs, self.leaves, self.J.codomain.leaves(self.v), retain_graph=True)

    def linearized(self) -> Callable[[], Any] | str:
        """Return the push-forward of `torch.func.linearize`, or why there is none."""
        try:
            push = torch.func.linearize(self.flat, *[leaf.detach() for leaf in self.leaves])[1]
        except NotImplementedError as error:
            return str(error).splitlines()[0]
        tangents = self.J.domain.leaves(self.d)
        return lambda: push(*tangents)


class InParameters(nn.Module):
    """A function of leaves as a module of one sample, whose parameters the leaves are."""

    def __init__(self, f: Callable[..., Any], leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.f, self.leaves = f, nn.ParameterList(leaf.detach().clone() for leaf in leaves)

    def forward(self, _: Tensor) -> Tensor:
        return self.f(*self.leaves)[None]


def by_mrpro(s: Setup, which: str) -> Callable[[], Any] | str:
    if imported("mrpro", "cpu") is None:
        return "not installed"
    if len(s.leaves) > 1:
        return "its adjoint is in one tensor only"
    from mrpro.operators import Jacobian

    J = Jacobian(lambda *x: (s.flat(*x),), *[leaf.detach() for leaf in s.leaves])
    argument = s.J.domain.leaves(s.d) if which == "J" else (s.v,)
    return lambda: (J if which == "J" else J.adjoint)(*argument)[0]


def by_curvlinops(s: Setup, which: str) -> Callable[[], Any] | str:
    library = imported("curvlinops", "cpu")
    if library is None:
        return "not installed"
    model, nothing = InParameters(s.flat, s.leaves), torch.zeros(1, 1)
    J = library.JacobianLinearOperator(model, list(model.parameters()), [(nothing, nothing)], check_deterministic=False)
    A, argument = (J, s.J.domain.leaves(s.d)) if which == "J" else (J.adjoint(), (s.v[None],))
    return lambda: (A @ list(argument))[0][0 if which == "J" else ...]


def peers(s: Setup, which: str) -> tuple[Ways, dict[str, str]]:
    """Return the ways of other libraries that are installed and can, and why the others are left out."""
    ways: Ways = {}
    skipped = {}
    for name, make in (("mrpro", by_mrpro), ("curvlinops", by_curvlinops)):
        way = make(s, which)
        if not isinstance(way, str):
            try:
                way()
            except (NotImplementedError, RuntimeError) as error:
                way = str(error).splitlines()[0]
        if isinstance(way, str):
            skipped[name] = way
        else:
            ways[name] = way
    return ways, skipped


@functools.lru_cache(maxsize=1)
def _setup(name: str, *, quick: bool) -> Setup:
    torch.manual_seed(0)
    return Setup(name, quick=quick)


@pytest.mark.parametrize("which", ["J", "J.H", "point"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by torch.func.linearize
def test_jacobian(name: str, which: str, quick: bool, compare: Any) -> None:
    s = _setup(name, quick=quick)
    J, skipped = s.J, {}
    ways: Ways
    if which == "J":
        ways, push = {"adjointlab": lambda: J(s.d)}, s.linearized()
        if isinstance(push, str):
            skipped["linearize"] = push
        else:
            ways["linearize"] = push
        found, without = peers(s, which)
        ways, skipped = ways | found, skipped | without
        assert_equal(ways, "adjointlab")
    elif which == "J.H":
        ways = {"adjointlab": lambda: J.H(s.v), "kept pull-back": s.pull_back}
        for found, expected in zip(J.domain.leaves(ways["adjointlab"]()), s.pull_back(), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        others, skipped = peers(s, which)
        assert_equal({"ours": lambda: J.domain.leaves(J.H(s.v))[0], **others}, "ours", 1e-4)
        ways |= others
    else:

        def point() -> None:
            K = J.at(s.x)
            K(s.d), K.H(s.v)

        ways = {"adjointlab": point, "J and J.H": lambda: (J(s.d), J.H(s.v)), "f": lambda: s.f(s.x)}
    with J.frozen():
        compare(ways, skipped=skipped, section="jacobians", map=which, case=s.case)
