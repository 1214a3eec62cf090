"""``A.gram`` and ``LeastSquares.hessian`` from one graph: what they follow, and where they step back."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from laws import assert_close, draw, seeded
from torch import Tensor, nn

import adjointlab as al

N = 12


class Sampled(nn.Module):
    """Coils, a centred Fourier transform, lines of it."""

    def __init__(self) -> None:
        super().__init__()
        coils = torch.randn(3, N, N, generator=seeded(1), dtype=torch.complex128)
        self.coils = nn.Parameter(coils, requires_grad=False)
        self.register_buffer("lines", (torch.rand(N, 1, generator=seeded(2)) > 0.4).double())

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.fft.ifftshift(self.coils * x[..., None, :, :], dim=(-2, -1))
        return self.lines * torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


@pytest.fixture
def A() -> al.LinearOperator:
    return al.linear_operator(Sampled(), torch.zeros(N, N, dtype=torch.complex128))


def equal(A: al.LinearOperator, gram: al.LinearOperator | None = None) -> None:
    gram, x = A.gram if gram is None else gram, draw(A.domain)
    assert_close(gram(x), A.H(A(x)), A.domain.eps)


def test_it_says_what_was_simplified(A: al.LinearOperator) -> None:
    assert "one graph: " in A.gram.explain()
    assert "ifft · fft cancelled along dimension 2" in A.gram.explain()
    assert "one graph" not in A.explain()
    nothing = al.linear_operator(lambda x: x.cumsum(0), (5,))
    assert "nothing to simplify" in nothing.gram.explain()


def test_it_is_its_own_adjoint(A: al.LinearOperator) -> None:
    gram = A.gram
    assert gram.H is gram
    assert al.check_adjoint(gram).passed


def test_state_is_followed(A: al.LinearOperator) -> None:
    gram = A.gram
    equal(A, gram)
    for change in (lambda m: m.lines.fill_(0.5), lambda m: m.coils.data.mul_(2j), lambda m: m.lines.zero_()):
        change(A.module)
        equal(A, gram)
    A.module.lines = torch.rand(N, N, generator=seeded(3), dtype=torch.float64)  # no more of lines
    equal(A, gram)


def test_a_state_that_changes_at_every_call_is_followed(A: al.LinearOperator) -> None:
    gram = A.gram
    for k in range(8):
        A.module.lines.mul_(1 + k)
        equal(A, gram)


def test_frozen_takes_the_state_on_entry(A: al.LinearOperator) -> None:
    gram, x = A.gram, draw(A.domain)
    with gram.frozen():
        before = gram(x)
        A.module.lines.mul_(2)
        assert torch.equal(gram(x), before)
    assert_close(gram(x), 4 * before, A.domain.eps)


def test_batches_of_any_size() -> None:
    A = al.linear_operator(Sampled(), torch.zeros(2, N, N, dtype=torch.complex128), batch_dims=1)
    for size in (2, 5, 1):
        x = torch.randn(size, N, N, generator=seeded(size), dtype=torch.complex128)
        assert_close(A.gram(x), A.H(A(x)), A.domain.eps)
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        A.gram(torch.zeros(N, dtype=torch.complex128))


def test_derivatives_are_those_of_the_two_maps(A: al.LinearOperator) -> None:
    A.module.coils.requires_grad_()
    x = draw(A.domain).requires_grad_()
    products = A.gram(x), A.H(A(x))
    results = [torch.autograd.grad((p * p.conj()).real.sum(), (x, A.module.coils)) for p in products]
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, A.domain.eps)
    with torch.no_grad():
        assert_close(A.gram(x), A.H(A(x)), A.domain.eps)


def test_under_transforms(A: al.LinearOperator) -> None:
    x = torch.stack([draw(A.domain, seed) for seed in range(3)])
    found = torch.func.vmap(A.gram)(x)
    assert_close(found, torch.stack([A.gram(row) for row in x]), A.domain.eps)
    _, tangent = torch.func.jvp(A.gram, (x[0],), (x[1],))
    assert_close(tangent, A.gram(x[1]), A.domain.eps)


def test_copies_and_pickles(A: al.LinearOperator) -> None:
    gram, x = A.gram, draw(A.domain)
    expected = gram(x)
    for other in (copy.deepcopy(gram), pickle.loads(pickle.dumps(gram))):
        assert torch.equal(other(x), expected)
        assert "one graph: " in other.explain()


def test_moves(A: al.LinearOperator) -> None:
    B = al.diagonal(torch.rand(3, N, N, generator=seeded(5)).to(torch.complex128)) @ A
    gram = B.gram
    equal(B, gram)
    float_lines = al.linear_operator(lambda x: x[..., 1:] - x[..., :-1], (4, 5))
    product = al.diagonal(torch.rand(4, 4)) @ float_lines
    moved = product.gram.double()
    x = torch.rand(4, 5, dtype=torch.float64)
    assert moved(x).dtype == torch.float64
    assert_close(moved(x), product.H(product(x)), product.domain.eps)


@pytest.mark.slow
def test_of_algebra(A: al.LinearOperator) -> None:
    D = al.diagonal(draw(A.domain, 3))
    c = torch.tensor(2.0 - 1j, dtype=torch.complex128)
    for B in (A / 2 + A, al.hstack([A, A]), A.T):
        equal(B)
    assert "cancelled" in (A @ D).gram.explain()
    wide = A @ D
    for B in (wide.H, wide, al.vstack([A, A @ D]).H):
        equal(B)
    (other := (A @ D)).H.gram(draw(other.codomain))  # the first that is asked for
    equal(other)
    scaled = c * A
    equal(scaled, gram := scaled.gram)
    c.mul_(2)
    equal(scaled, gram)


def test_of_algebra_with_a_state(A: al.LinearOperator) -> None:
    B = A @ al.diagonal(draw(A.domain, 3))
    gram = B.gram
    equal(B, gram)
    A.module.lines.fill_(1)
    equal(B, gram)
    with gram.frozen():
        equal(B, gram)


def test_of_what_is_no_graph() -> None:
    eager = al.linear_operator(lambda x: x.cumsum(0), (5,), engine="eager")
    pair = al.from_pair(lambda x: x[1:], lambda y: nn.functional.pad(y, (1, 0)), (5,), (4,))
    for B in (eager, pair, 2 * pair, al.identity((4,)) @ pair, al.identity((3,))):
        equal(B)
        assert "one graph" not in B.gram.explain()


def test_hessians(A: al.LinearOperator) -> None:
    weight = torch.rand(3, N, N, generator=seeded(7), dtype=torch.float64)
    x, y = draw(A.domain), draw(A.codomain)
    for w in (weight, weight[:, :, :1].expand(3, N, N), al.diagonal(weight.to(torch.complex128))):
        F = al.LeastSquares(A, y, w)
        assert_close(F.hessian(x), A.H(F.weight(A(x))), A.domain.eps)
        assert "one graph: " in F.hessian.explain()
        assert_close(F.hessian(x), F.gradient(x) - F.gradient(0 * x), A.domain.eps, factor=64)
        assert_close(pickle.loads(pickle.dumps(F.hessian))(x), F.hessian(x), A.domain.eps)
    squares = A @ A.H  # a weight that is no diagonal
    assert_close(al.LeastSquares(A, y, squares).hessian(x), A.H(squares(A(x))), A.domain.eps)


def test_gradients_in_weights_go_through_a_hessian(A: al.LinearOperator) -> None:
    w = torch.rand(3, N, N, generator=seeded(8), dtype=torch.complex128).real.to(torch.complex128).requires_grad_()
    x = draw(A.domain)
    H = al.LeastSquares(A, draw(A.codomain), al.diagonal(w)).hessian
    (found,) = torch.autograd.grad((H(x) * x.conj()).real.sum(), w)
    assert_close(found, (A(x) * A(x).conj()).detach(), A.domain.eps)


def test_a_result_may_be_written_to(A: al.LinearOperator) -> None:
    eye = al.linear_operator(lambda x: torch.fft.fft2(x, norm="ortho"), A.domain)  # whose gram is the identity
    x = draw(A.domain)
    before = x.clone()
    found = eye.gram(x)
    assert_close(found, x, A.domain.eps)
    found.zero_()
    assert torch.equal(x, before)


def test_no_state_is_changed(A: al.LinearOperator) -> None:
    before = [t.clone() for t in (A.module.coils, A.module.lines)]
    x = draw(A.domain)
    kept = x.clone()
    A.gram(x)
    assert torch.equal(x, kept)
    assert all(map(torch.equal, (A.module.coils, A.module.lines), before))


def test_a_mask_of_whole_lines_is_taken_for_one_as_long_as_it_is(A: al.LinearOperator) -> None:
    A.module.lines = A.module.lines.expand(N, N).clone()
    gram = A.gram
    assert "cancelled along dimension 2" in gram.explain()
    equal(A, gram)
    A.module.lines[0, 0] += 1
    equal(A, gram)
    A.module.lines = A.module.lines[:, 1:2].expand(N, N).clone()
    equal(A, gram)


def test_a_refresh_of_a_part_is_followed() -> None:
    scale = {"of": 2.0}

    def hidden() -> float:
        return scale["of"]

    A = al.linear_operator(lambda x: hidden() * torch.fft.fft(x, norm="ortho"), torch.zeros(8, dtype=torch.complex128))
    B = al.diagonal(draw(A.codomain)) @ A
    gram = B.gram
    equal(B, gram)
    scale["of"] = 3.0
    B.refresh()
    equal(B, gram)
    scale["of"] = 4.0
    A.refresh()
    equal(B, gram)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.bool])
def test_factors_of_less_precision(dtype: torch.dtype) -> None:
    mask = (100 * torch.rand(6, 1, generator=seeded(4))).to(dtype)
    module = nn.Module()
    module.register_buffer("mask", mask)
    module.forward = lambda x: module.mask * torch.fft.fft2(module.mask * x)
    for f in (lambda x: module.mask * x, lambda x: module.mask * torch.fft.fft2(x)):
        A = al.linear_operator(f, torch.zeros(6, 6, dtype=torch.complex128))
        equal(A, gram := A.gram)
        module.mask.copy_((300 * torch.rand(6, 1, generator=seeded(5))).clamp(max=127).to(dtype))
        assert "one graph" in gram.explain()
        equal(A, gram)


def test_a_complex_weight_has_its_own_adjoint(A: al.LinearOperator) -> None:
    weighted = al.LeastSquares(A, draw(A.codomain), al.diagonal(draw(A.codomain, 5))).hessian
    assert al.check_adjoint(weighted).passed


def test_inside_compiled_code(A: al.LinearOperator) -> None:
    x, gram = draw(A.domain), A.gram  # made before: torch.compile cannot make modules, before torch 2.11
    found = torch.compile(lambda x: gram(x) + x, backend="eager")(x)
    assert_close(found, gram(x) + x, A.domain.eps)


def test_cgls_on_the_normal_equations(A: al.LinearOperator) -> None:
    y = draw(A.codomain)
    weight = 0.5 + torch.rand(3, N, N, generator=seeded(9), dtype=torch.float64)
    for options in ({}, {"damp": 0.1}, {"weight": weight}, {"damp": 0.2, "weight": weight}):
        one, two = (al.solvers.cgls(A, y, normal=normal, tol=1e-12, **options) for normal in (True, False))
        assert one.converged
        assert two.converged
        assert torch.dist(one.x, two.x) <= 1e-9 * two.x.norm()
    x0 = draw(A.domain, 2)
    again = al.solvers.cgls(A, y, normal=True, x0=x0, damp=0.1, tol=1e-12)
    assert torch.dist(again.x, al.solvers.cgls(A, y, damp=0.1, tol=1e-12).x) <= 1e-9 * again.x.norm()


def test_cgls_on_the_normal_equations_of_batches() -> None:
    A = al.linear_operator(Sampled(), torch.zeros(2, N, N, dtype=torch.complex128), batch_dims=1)
    y = torch.randn(4, 3, N, N, generator=seeded(1), dtype=torch.complex128)
    weight = 0.5 + torch.rand(4, 3, N, N, generator=seeded(9), dtype=torch.float64)
    for options in ({"damp": 0.1}, {"damp": torch.tensor([0.1, 0.2, 0.3, 1.0]), "weight": weight}):
        one, two = (al.solvers.cgls(A, y, normal=normal, tol=1e-12, **options) for normal in (True, False))
        assert bool(one.converged.all())
        assert torch.dist(one.x, two.x) <= 1e-9 * two.x.norm()


def test_the_normal_equations_end_with_a_reason() -> None:
    A = al.linear_operator(lambda x: torch.logspace(0, -6, 20) * x, (20,))
    y = torch.ones(20)
    solution = al.solvers.cgls(A, y, normal=True, tol=0.0, maxiter=500)
    assert "precision" in solution.reason
    tiny = al.solvers.cgls(1e-30 * al.identity(A.domain), y, normal=True)  # whose square is no number of the dtype
    assert tiny.converged
    nothing = al.solvers.cgls(A, 0 * y, normal=True)
    assert nothing.converged
    assert not nothing.x.any()
    bad = al.solvers.cgls(A, y / 0, normal=True)
    assert not bad.converged


def test_threads_build_it_once(A: al.LinearOperator) -> None:
    gram, x, found = A.gram, draw(A.domain), []
    threads = [threading.Thread(target=lambda: found.append(gram(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, found[0]) for each in found)
