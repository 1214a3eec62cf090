"""Preconditioners: what they are of operators whose inverse is known, and that they help those that they are for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import norm
from torch import Tensor, nn

import adjointlab as al
from adjointlab import precondition
from adjointlab.precondition.columns import squared_norms

Make = Callable[[], al.LinearOperator]
functional = nn.functional


def blur(mode: str = "zeros", channels: int = 1, width: int = 5) -> nn.Conv2d:
    profile = torch.exp(-0.5 * (torch.arange(float(width)) - width // 2).square() / 1.5**2)
    c = nn.Conv2d(channels, channels, width, padding=width // 2, padding_mode=mode, bias=False).requires_grad_(False)
    c.weight.copy_((profile[:, None] * profile / profile.sum() ** 2).expand_as(c.weight))
    return c


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def of_convolution(c: nn.Module, *shape: int) -> Make:
    return lambda: al.linear_operator(c, shape)


KNOWN: dict[str, Make] = {
    "dense": lambda: al.matrix(torch.randn(7, 5, dtype=torch.complex64)),
    "sparse": lambda: al.matrix(torch.randn(7, 6).relu().to_sparse_csr(), domain=(2, 3)),
    "linear layer": lambda: al.linear_operator(nn.Linear(5, 7, bias=False), (3, 5)),
    **{
        f"{mode} border": of_convolution(blur(mode), 1, 1, 9, 8)
        for mode in ("zeros", "reflect", "circular", "replicate")
    },
    "strides and groups": of_convolution(
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), dilation=(1, 2), groups=2, padding=(1, 3), bias=False), 2, 4, 9, 12
    ),
    "transposed": of_convolution(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), 2, 4, 9),
    "three dimensions": of_convolution(nn.Conv3d(1, 2, 3, bias=False), 1, 1, 5, 6, 7),
    "pool": of_convolution(nn.AvgPool2d(3, 2, 1), 1, 1, 9, 9),
    "samples": lambda: al.linear_operator(
        lambda x: functional.grid_sample(x, 2 * random(1, 6, 6, 2) - 1, align_corners=False), (1, 1, 8, 8)
    ),
    "masked blur": lambda: al.diagonal(random(1, 1, 9, 8)) @ al.linear_operator(blur("reflect"), (1, 1, 9, 8)),
    "adjoint": lambda: al.linear_operator(blur("reflect"), (1, 1, 9, 8)).H,
    "stack": lambda: al.vstack([al.linear_operator(blur(), (1, 1, 9, 8)), al.identity((1, 1, 9, 8))]),
    "through a number": lambda: al.linear_operator(lambda x: -x[0] * random(6), (2,)),
    "two outputs": lambda: al.linear_operator(lambda x: (x.diff(dim=-1), 0 * x, x.sum(0)), (4, 5)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_of_columns_are_exact_where_entries_are_known(name: str, weighted: bool) -> None:
    A = KNOWN[name]()
    weight = A.codomain.unflatten([random(*s.shape, seed=i) for i, s in enumerate(A.codomain.specs)])
    found = squared_norms(
        A,
        A.codomain.unflatten(
            [w.to(s.dtype) for w, s in zip(A.codomain.structure.leaves(weight), A.codomain.specs, strict=True)]
        )
        if weighted
        else None,
        A.domain,
    )
    dense = al.to_dense(A)
    w = torch.cat([t.reshape(-1) for t in A.codomain.structure.leaves(weight)]) if weighted else torch.ones(len(dense))
    expected = (w[:, None] * dense.abs().square()).sum(0).double()
    assert found is not None
    assert norm(found.reshape(-1) - expected) <= 16 * A.domain.eps * norm(expected)
    M = precondition.diagonal(A, weight=weight if weighted else None, damp=0.5)
    assert norm(M(M.domain.randn()) * 0) == 0  # on the domain of A
    ones = A.domain.element(torch.ones(A.domain.size, dtype=dense.dtype))
    assert norm(A.domain.vector(M(ones)) * (expected + 0.25) - 1) <= 16 * A.domain.eps * A.domain.size


def test_norms_of_columns_are_probed_elsewhere() -> None:
    K = torch.fft.rfft2(functional.pad(blur().weight, (0, 19, 0, 15)))
    gain = random(20, 24) + 0.1
    A = al.linear_operator(lambda x: torch.fft.irfft2(K * torch.fft.rfft2(gain * x), s=(20, 24)), (1, 1, 20, 24))
    assert squared_norms(A, None, A.domain) is None
    expected = al.to_dense(A).square().sum(0).reshape(1, 1, 20, 24)
    for samples, bound in ((25, 0.3), (480, 64 * A.domain.eps)):  # columns 9 places apart do not overlap
        found = 1 / precondition.diagonal(A, samples=samples)(torch.ones(1, 1, 20, 24))
        assert norm(found - expected) <= bound * norm(expected)


def test_doubtful_norms_are_told() -> None:
    A = al.linear_operator(
        lambda x: torch.fft.ifft(torch.fft.fft(x) * torch.eye(1, 400)), torch.zeros(400, dtype=torch.complex64)
    )
    with pytest.warns(al.ConvergenceWarning, match=r"probed with an error of about \d+%: raise samples"):
        precondition.diagonal(A, samples=5)


def test_a_column_of_zeros_is_safe() -> None:
    A = al.diagonal(torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(precondition.diagonal(A)(torch.ones(3)), torch.tensor([0.25, 0.25, 1.0]))
    for M in (precondition.diagonal(0 * A), precondition.circulant(0 * A), precondition.nystrom(0 * A, 2)):
        assert torch.isfinite(M(torch.ones(3))).all()
        found = al.solvers.cgls(0 * A, torch.ones(3), precondition=M)
        assert found.converged
        assert not found.x.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_the_spectrum_of_a_cyclic_convolution_is_exact(dtype: torch.dtype, damp: float) -> None:
    c = blur("circular", 1).to(dtype)
    c.weight[..., 2, 2] += 1
    A = al.linear_operator(c, torch.zeros(1, 1, 11, 12, dtype=dtype))
    x = A.domain.randn(torch.Generator().manual_seed(0))
    M = precondition.circulant(A, damp=damp, samples=1)
    assert M.H is M
    assert norm(M(A.gram(x) + damp**2 * x) - x) <= 1e3 * A.domain.eps * norm(x)
    assert al.solvers.cgls(A, A(x), damp=damp, precondition=M).iterations <= 2


@pytest.mark.parametrize("build", [precondition.circulant, precondition.auto, lambda A: precondition.nystrom(A, 9)])
@pytest.mark.parametrize(
    "domain",
    [
        (2, 3, 6, 5),
        {"a": (4, 4), "b": (7,)},
        (torch.zeros(1, 1, 9, dtype=torch.complex128), torch.zeros(4, 4).double()),
    ],
    ids=["channels", "dictionary", "mixed"],
)
def test_they_are_self_adjoint_and_positive(build: Any, domain: Any) -> None:
    A = (
        al.identity(domain)
        if not isinstance(domain, tuple) or isinstance(domain[0], Tensor)
        else al.linear_operator(blur("reflect", 3, 3), domain)
    )
    M = build(A)
    dense = al.to_dense(M, real=True)
    assert norm(dense - dense.T) <= 64 * M.domain.eps * norm(dense)
    assert torch.linalg.eigvalsh(dense.double())[0] > 0


def test_nystrom_has_the_largest_eigenvalues() -> None:
    values = torch.cat([torch.linspace(50, 100, 5), torch.linspace(0.1, 0.2, 35)]).double()
    Q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.complex128)).Q
    A = al.matrix(Q * values @ Q.mH)
    y = torch.randn(40, dtype=torch.complex128)
    M = precondition.nystrom(A, 8, damp=1.0)
    damped = values.square() + 1
    assert al.solvers.cgls(A, y, damp=1.0, tol=1e-8).iterations > 8
    assert al.solvers.cgls(A, y, damp=1.0, tol=1e-8, precondition=M).iterations <= 5
    whole = precondition.nystrom(A, 40, damp=1.0)
    assert norm(whole(y) - Q @ ((Q.mH @ y) / damped)) <= 1e-9 * norm(y)


def test_draws_are_those_of_the_generator() -> None:
    A = al.linear_operator(blur("reflect"), (1, 1, 9, 8))
    x, before = torch.ones(1, 1, 9, 8), torch.get_rng_state()
    for build in (precondition.circulant, lambda A, **o: precondition.nystrom(A, 5, **o)):
        first, again, other = (build(A, generator=torch.Generator().manual_seed(seed))(x) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_they_move_and_are_copied() -> None:
    A = al.linear_operator(blur("reflect"), (1, 1, 9, 8))
    for M in (precondition.auto(A), precondition.nystrom(A, 4), precondition.diagonal(A)):
        x = torch.randn(1, 1, 9, 8)
        assert torch.equal(copy.deepcopy(M)(x), M(x))
        wide = copy.deepcopy(M).double()
        assert norm(wide(x.double()) - M(x)) <= 64 * A.domain.eps * norm(M(x))


def test_every_problem_of_a_batch_has_its_own() -> None:
    gains = torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1, 1)
    c = blur("reflect", width=3)
    A = al.linear_operator(lambda x: gains * c(x), torch.zeros(3, 1, 16, 16), batch_dims=1)
    y, damp = torch.randn(3, 1, 16, 16), torch.tensor([0.1, 1.0, 0.01])
    options = {"damp": damp, "tol": 1e-4}
    plain = al.solvers.cgls(A, y, **options)
    found = al.solvers.cgls(A, y, precondition="auto", **options)
    assert found.converged.all()
    assert (found.iterations < plain.iterations).all()
    free = al.linear_operator(c, torch.zeros(1, 1, 16, 16), batch_dims=1)  # another number of problems
    weight = random(3, 1, 16, 16) + 0.1
    assert al.solvers.cgls(free, y, weight=weight, precondition="auto", **options).converged.all()
    M = precondition.auto(free, damp=0.1)  # the same for all of them
    assert al.solvers.cgls(free, y, damp=0.1, tol=1e-4, precondition=M).converged.all()


def masked() -> tuple[al.LinearOperator, Tensor | None, float]:
    mask, c = (random(1, 1, 64, 64) < 0.7).float(), blur(width=9)
    return al.linear_operator(lambda x: mask * c(x), (1, 1, 64, 64)), None, 0.01


def weighted() -> tuple[al.LinearOperator, Tensor | None, float]:
    w = torch.linspace(0.1, 1, 64) * torch.ones(1, 1, 64, 64)
    w[..., 25:35, 30:40] = 0
    return al.linear_operator(blur(width=9), (1, 1, 64, 64)), w, 0.03


def scaled() -> tuple[al.LinearOperator, Tensor | None, float]:
    sensitivity, c = torch.logspace(0, -2, 64), blur(width=9)
    return al.linear_operator(lambda x: c(sensitivity * x), (1, 1, 64, 64)), None, 3e-3


def reflected() -> tuple[al.LinearOperator, Tensor | None, float]:
    return al.linear_operator(blur("reflect", width=9), (1, 1, 64, 64)), None, 0.01


def gridded() -> tuple[al.LinearOperator, Tensor | None, float]:
    n, angles = torch.arange(-8.0, 8), torch.arange(24.0) * math.pi / 24
    angle, radius = (t.reshape(-1, 1, 1) for t in torch.meshgrid(angles, torch.arange(-16.0, 16) / 32, indexing="ij"))
    phase = radius * (angle.cos() * n[:, None] + angle.sin() * n)
    return al.matrix(torch.exp(-2j * math.pi * phase).reshape(-1, 256) / 16, domain=(16, 16)), None, 0.02


@pytest.mark.parametrize(
    ("problem", "gain"), [(masked, 1.5), (weighted, 1.8), (scaled, 4), (reflected, 1.5), (gridded, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_automatic_one_takes_fewer_steps(problem: Any, gain: float) -> None:
    A, weight, damp = problem()
    y = A(A.domain.unflatten([(random(*s.shape) > 0.5).to(s.dtype) for s in A.domain.specs]))
    options = {"weight": weight, "damp": damp, "tol": 1e-5}
    plain, found = (al.solvers.cgls(A, y, precondition=M, **options) for M in (None, "auto"))
    assert found.converged
    assert found.iterations <= plain.iterations / gain


def test_bad_arguments_are_refused() -> None:
    A = al.linear_operator(blur(), (1, 1, 9, 8))
    for call, error, match in (
        (lambda: precondition.diagonal(A, samples=0), ValueError, "samples to be an integer of 1 or more"),
        (lambda: precondition.circulant(A, dims=5), ValueError, "dims between 1 and 4"),
        (lambda: precondition.circulant(A, scale=torch.ones(3)), al.SpaceMismatchError, "scale to be an element"),
        (lambda: precondition.nystrom(A, 0), ValueError, "rank to be an integer between 1 and 72"),
        (lambda: precondition.nystrom(A, 2, damp=torch.ones(3)), ValueError, "damp to be one number"),
        (lambda: precondition.auto(A, damp=torch.ones(3)), ValueError, "one for each problem of the batch"),
        (lambda: precondition.auto(nn.Identity()), al.SpaceMismatchError, "expected"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_automatic_one_of_an_operator_of_extreme_size(scale: float) -> None:
    A = scaled()[0]
    y = A(random(1, 1, 64, 64))
    plain, found = (
        al.solvers.cgls(B, y, damp=s * 0.1, tol=1e-4, precondition="auto") for B, s in ((A, 1.0), (scale * A, scale))
    )
    assert found.converged
    assert found.iterations <= plain.iterations + 4
    # Both gradients are within 1e-4 of the first one, and the equations are 0.01 at least.
    assert norm(scale * found.x - plain.x) <= 2e-4 / 0.01 * norm(A.H(y))


def test_leaves_without_dimensions_and_every_kind_of_damping() -> None:
    A = al.linear_operator(
        lambda d: d["image"] + 2 * d["offset"], {"image": torch.zeros(3, 4), "offset": torch.zeros(())}
    )
    y = torch.randn(3, 4)
    assert al.solvers.cgls(A, y, precondition="auto").converged
    for damp in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="damp to be finite and 0 or more"):
            precondition.diagonal(A, damp=damp)


def test_derivatives_through_the_automatic_one() -> None:
    c = blur("reflect", width=3).requires_grad_(True)
    A = al.linear_operator(c, (1, 1, 12, 12))
    y, w, damp = torch.randn(1, 1, 12, 12), random(1, 1, 12, 12).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    plain, found = (
        torch.autograd.grad(
            al.solvers.cgls(A, y, weight=w, damp=damp, precondition=M).x.square().sum(), (c.weight, w, damp)
        )
        for M in (None, "auto")
    )
    for a, b in zip(plain, found, strict=True):
        assert norm(a - b) <= 1e-3 * norm(a)  # κ ≤ (1 + 0.09) / 0.09, twice, and tol = 1e-6


def test_the_automatic_one_leaves_equations_near_the_identity_alone() -> None:
    n = 32
    seen = (torch.fft.fftfreq(n)[:, None].square() + torch.fft.fftfreq(n).square()).sqrt() < 0.5
    A = al.linear_operator(lambda x: seen * torch.fft.fft2(x, norm="ortho"), torch.zeros(n, n, dtype=torch.complex64))
    x = A.domain.randn()
    assert torch.equal(precondition.auto(A, damp=0.01)(x), x)
    blurred, weight, damp = masked()  # far from it
    x = blurred.domain.randn()
    assert not torch.allclose(precondition.auto(blurred, weight=weight, damp=damp)(x), x)


def test_the_automatic_one_does_not_filter_where_places_have_nothing_in_common() -> None:
    A = al.matrix((random(400, 100) - 0.5) * torch.logspace(0, -3, 100))
    x = A.domain.randn()
    expected = precondition.diagonal(A)(x)
    assert torch.equal(precondition.auto(A)(x), expected)
    assert not torch.equal(precondition.circulant(A)(x), expected)
