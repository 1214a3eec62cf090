"""Recurrences against plain loops in Python: values, adjoints, gradients, and what else operators are."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from dataclasses import replace
from typing import Any

import pytest
import scipy.signal
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.errors import NotLinearError, SpaceMismatchError
from adjointlab.transpose import lowered
from adjointlab.transpose.graph.ops import op_name
from tests.recurrence_zoo import ZOO, Case, Heat, Hidden, draw, moving, r, rotation

D = torch.float64
EPS = torch.finfo(D).eps


@functools.cache
def built(name: str) -> al.LinearOperator[Any, Any]:
    return ZOO[name].build()


def flat(tree: Any) -> Tensor:
    """Return all entries of a pytree as one real vector."""
    leaves = [leaf for _, leaf in sorted(tree.items())] if isinstance(tree, dict) else pytree.tree_leaves(tree)
    parts = [torch.view_as_real(t.detach().resolve_conj()) if t.is_complex() else t.detach() for t in leaves]
    return torch.cat([t.reshape(-1) for t in parts])


def assert_close(found: Any, expected: Any, units: float = 64) -> None:
    a, b = flat(found), flat(expected)
    assert torch.dist(a, b) <= units * EPS * max(1.0, float(b.norm()))


def parameters(case: Case) -> list[Tensor]:
    given = [t for t in pytree.tree_leaves(case.options.get("xs", [])) if t.requires_grad]
    return [*(case.step.parameters() if isinstance(case.step, nn.Module) else ()), *given]


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_loop_and_its_adjoint(name: str) -> None:
    case = ZOO[name]
    A = built(name)
    assert A.engine == "traced"
    with torch.no_grad():
        x = A.domain.randn(draw(1))
        assert_close(A(x), case.reference(x))
        matrix, adjoint = al.to_dense(A), al.to_dense(A.H)
        assert torch.dist(adjoint, matrix.mH) <= 64 * EPS * max(1.0, float(torch.linalg.matrix_norm(matrix)))
        y = A.codomain.randn(draw(3))
        forth, back = A.codomain.inner(A(x), y).real, A.domain.inner(x, A.H(y)).real
        assert abs(forth - back) <= 64 * EPS * (A.codomain.norm(A(x)) * A.codomain.norm(y) + 1)
    assert A.H.H is A


@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_loop(name: str) -> None:
    case, A = ZOO[name], built(name)
    leaves = [t.requires_grad_() for t in A.domain.leaves(A.domain.randn(draw(2)))]
    x, y = A.domain.unflatten(leaves), A.codomain.randn(draw(3))
    wanted = [*leaves, *parameters(case)]
    expected = torch.autograd.grad(A.codomain.inner(y, case.reference(x)).real, wanted)
    for image in (A.codomain.inner(y, A(x)), A.domain.inner(A.H(y), x)):
        for found, reference in zip(torch.autograd.grad(image.real, wanted), expected, strict=True):
            assert_close(found, reference, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heat", "wave, state and traces", "hidden, batches", "matrices of each time"])
def test_derivatives_of_any_order_are_right(name: str) -> None:
    case, A = ZOO[name], built(name)
    theta, x, y = parameters(case), A.domain.randn(draw(1)), A.codomain.randn(draw(2))
    leaves = [t.requires_grad_() for t in (*A.domain.leaves(x), *A.codomain.leaves(y))]
    n = len(A.domain.specs)

    def function(*tensors: Tensor) -> Tensor:
        element, cotangent = (
            A.domain.unflatten(tensors[:n]),
            A.codomain.unflatten(tensors[n : n + len(A.codomain.specs)]),
        )
        image, back = A.codomain.leaves(A(element)), A.domain.leaves(A.H(cotangent))
        return sum((t.square().sum() for t in (*image, *back)), torch.zeros((), dtype=D))

    tensors = [*leaves, *theta]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_it_is_scipys_filter() -> None:
    A, x = built("iir"), r(9)
    expected = scipy.signal.lfilter([0.2, 0.3, 0.1], [1, -0.4, 0.3], x.numpy())
    assert_close(A(x), torch.from_numpy(expected))


def test_it_keeps_states_for_gradients_in_the_step_alone_and_as_many_as_their_root() -> None:
    A = al.recurrence(Heat(41), torch.zeros(41, 41, dtype=D), steps=400)
    x = A.domain.randn().requires_grad_()
    before = alive((41, 41))
    of_step = A(x)
    assert 20 <= alive((41, 41)) - before <= 22
    del of_step
    A.requires_grad_(False)
    of_x = A(x)
    assert alive((41, 41)) - before <= 2
    (gradient,) = torch.autograd.grad(of_x.sum(), x)
    assert torch.equal(gradient, A.H(torch.ones_like(x)).detach())


def alive(shape: tuple[int, ...]) -> int:
    """Return how many tensors of a shape there are."""
    gc.collect()
    return sum(type(item) is Tensor and tuple(item.shape) == shape for item in gc.get_objects())


def test_sizes_of_batches_are_free() -> None:
    A = built("hidden, batches")
    for batch in (1, 5):
        space = A.domain.with_batch((batch,))
        x, y = space.randn(), A.codomain.with_batch((batch,)).randn()
        assert_close(A(x), ZOO["hidden, batches"].reference(x))
        assert abs((A(x) * y).sum() - (x * A.H(y)).sum()).detach() <= 64 * EPS * x.norm() * y.norm()


def test_it_is_an_operator_as_others_are() -> None:
    A = built("wave")
    x, y = A.domain.randn(), A.codomain.randn()
    assert_close((2 * A).H(y), 2 * A.H(y))
    assert_close(A.gram(x), A.H(A(x)))
    assert al.check_adjoint(A).passed
    assert "recurrence(A, steps=7)" in repr(A)
    assert "does not read the input" in A.explain()
    assert {name.rpartition(".")[2] for name, _ in A.named_parameters()} == {"speed"}
    assert al.solvers.cgls(A, A(x).detach(), maxiter=60).residual_norms[-1] < 1e-6 * float(A(x).detach().norm())
    twin = copy.deepcopy(A)
    assert_close(twin(x), A(x))
    with torch.no_grad():
        next(twin.parameters()).mul_(0.5)
    assert torch.dist(twin(x), A(x)) > 1e-3
    assert_close(pickle.loads(pickle.dumps(A)).H(y), A.H(y))
    with A.frozen():
        assert_close(A(x), ZOO["wave"].reference(x))


@pytest.mark.parametrize("name", ["matrices of each time", "wave", "oscillator"])
def test_it_moves_to_another_dtype(name: str) -> None:
    case = copy.deepcopy(ZOO[name])
    A = case.build()
    x = A.domain.randn()
    expected = A(x)
    A.to(torch.float32)
    assert all(spec.dtype in {torch.float32, torch.complex64} for spec in (*A.domain.specs, *A.codomain.specs))
    narrow = A.domain.unflatten([t.to(s.dtype) for t, s in zip(pytree.tree_leaves(x), A.domain.specs, strict=True)])
    bound = 256 * float(torch.finfo(torch.float32).eps) * float(flat(expected).norm())
    assert torch.dist(flat(A(narrow)).double(), flat(expected)) <= bound
    assert al.check_adjoint(A).passed
    assert_close(pickle.loads(pickle.dumps(A))(narrow), A(narrow)) if name != "oscillator" else None


def test_changes_of_parameters_and_of_series_are_followed() -> None:
    step = Heat(5)
    A, x = al.recurrence(step, torch.zeros(5, 5, dtype=D), steps=3), torch.ones(5, 5, dtype=D).triu()
    with torch.no_grad():
        step.kappa.mul_(0.5)
    assert_close(A(x), Case(step, x, {"steps": 3}).reference(x))
    matrices = r(4, 3, 3)
    B, z = al.recurrence(moving, torch.zeros(3, dtype=D), xs=matrices), r(3)
    matrices.mul_(2)
    assert_close(B(z), matrices[3] @ matrices[2] @ matrices[1] @ matrices[0] @ z)


def test_the_eager_engine_has_the_same_values_and_gradients() -> None:
    for name in ("coils of each time", "matrices of each time", "hidden, batches", "wave, state and traces"):
        case = ZOO[name]
        A, B = built(name), case.build(engine="eager")
        assert B.engine == "eager"
        x, y = A.domain.randn(draw(1)), A.codomain.randn(draw(2))
        assert_close(B(x), A(x))
        assert_close(B.H(y), A.H(y))
        wanted = parameters(case)
        if wanted:
            found = [torch.autograd.grad(C.domain.inner(C.H(y), x).real, wanted) for C in (A, B)]
            assert_close(found[0], found[1], 256)


def test_transforms_see_through_it() -> None:
    A = built("wave")
    x = torch.stack([A.domain.randn(draw(seed)) for seed in range(3)])
    with torch.no_grad():
        assert_close(torch.vmap(A)(x), torch.stack([A(row) for row in x]))
        tangent = torch.func.jvp(A, (x[0],), (x[1],))[1]
        assert_close(tangent, A(x[1]))


def test_the_users_step_is_left_as_it_was() -> None:
    step = Hidden().train()
    before, state = torch.get_rng_state(), copy.deepcopy(step.state_dict())
    A = al.recurrence(step, torch.zeros(2, 3, dtype=D), inputs=torch.zeros(4, 2, 2, dtype=D))
    A(A.domain.zeros())
    assert torch.equal(torch.get_rng_state(), before)
    assert step.training
    assert all(torch.equal(a, b) for a, b in zip(step.state_dict().values(), state.values(), strict=True))


def test_results_are_the_callers_own() -> None:
    A = al.recurrence(rotation, torch.zeros(2, dtype=D), steps=0)
    x = torch.ones(2, dtype=D)
    A(x).zero_()
    assert torch.equal(x, torch.ones(2, dtype=D))
    B = al.recurrence(lambda u, i: (u, u + i), (2,), inputs=(3, 2), initial=True, final=True)
    u, i = torch.ones(2), torch.ones(3, 2)
    state, _ = B((u, i))
    state.zero_()
    assert torch.equal(u, torch.ones(2))


# -- refusals ----------------------------------------------------------------------------------------------------------


def rolled(u: Tensor, x: Tensor) -> Tensor:
    return u.roll(int(x))


def test_numbers_taken_from_a_series_need_the_eager_engine() -> None:
    shifts = torch.tensor([0, 1, 1])
    with pytest.raises(NotLinearError, match='choose engine="eager"'):
        al.recurrence(rolled, (3,), xs=shifts)
    A, x = al.recurrence(rolled, (3,), xs=shifts, engine="eager"), torch.tensor([1.0, 2, 3])
    assert torch.equal(A(x), x.roll(2))
    assert torch.equal(A.H(x), x.roll(-2))


def test_a_state_that_was_changed_before_the_backward_is_noticed() -> None:
    step = nn.Linear(2, 2, bias=False)
    loss = al.recurrence(step, (2,), steps=9)(torch.ones(2)).sum()
    with torch.no_grad():
        step.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["wave", "heat", "hidden, batches", "matrices of each time", "coils of each time"])
def test_gradients_by_parts_are_those_by_sweeps_that_share_their_work(name: str) -> None:
    case = ZOO[name]
    A, B = case.build(), case.build()
    source = B.parts[0].source
    source._derivations = {
        batch: [replace(known, in_sweeps=lambda *_: None)] for batch, (known,) in source._derivations.items()
    }
    x, y = A.domain.randn(draw(1)), A.codomain.randn(draw(2))
    wanted = parameters(case) or [t.requires_grad_() for t in A.domain.leaves(x)]
    found = [torch.autograd.grad(C.domain.inner(C.H(y), x).real, wanted) for C in (A, B)]
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 256)


def test_a_sweep_keeps_what_gradients_read_and_leaves_what_is_the_same_to_the_end() -> None:
    A = ZOO["wave"].build()
    source = A.parts[0].source
    derivation, state = source.now(())
    speed = next(i for i, tensor in enumerate(state) if tensor.requires_grad)
    programs = derivation.in_sweeps(2, (), (speed,))
    assert programs is not None
    assert programs.given == ()  # neither of the two images that the state has, but one that is computed of them
    assert [tuple(node.meta["val"].shape) for node in programs.forth.graph.outputs] == [(6, 6)] * 3
    assert [tuple(t.shape) for t in programs.sums] == [(6, 6)]
    names = [op_name(node.target) for node in programs.back.graph.body.nodes if node.op == "call_function"]
    assert "addcmul" in names


def test_a_sweep_that_keeps_something_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    true = lowered.sweeps

    def wrong(*arguments: Any) -> Any:
        found = true(*arguments)
        return replace(found, given=found.given[::-1])

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(r(3, seed=seed)) for seed in (5, 6))

        def forward(self, u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.a * u[0] + u[1], self.b * u[1] - u[0]

    step = Mixed()
    state = (torch.zeros(3, dtype=D), torch.zeros(3, dtype=D))
    x = (r(3, seed=1), r(3, seed=2))
    found = []
    for each in (true, wrong):
        monkeypatch.setattr(lowered, "sweeps", each)
        A = al.recurrence(step, state, steps=5)
        found.append(torch.autograd.grad(sum(t.sum() for t in A(x)), list(step.parameters())))
        (known,) = A.parts[0].source._derivations[()]
        assert (known.in_sweeps(2, (), (0, 1)) is None) is (each is wrong)
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_gradients_follow_what_is_frozen_later() -> None:
    step = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)
    A, x = al.recurrence(step, (2,), steps=4), torch.ones(2)
    assert not A(x).requires_grad
    step[1].requires_grad_(True)
    A(x).sum().backward()
    expected = step[1].weight.grad.clone()
    step.requires_grad_(True).zero_grad()
    A(x).sum().backward()
    assert torch.allclose(step[1].weight.grad, expected)
    assert step[0].weight.grad is not None


def thresholded(u: Tensor, x: Tensor) -> Tensor:
    return torch.where(x > 0, u, u.abs())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: al.recurrence(torch.relu, (3,), steps=2), NotLinearError, "expected a linear map"),
        (lambda: al.recurrence(rotation, (2,)), SpaceMismatchError, "expected the number of steps, got none"),
        (lambda: al.recurrence(rotation, (2,), steps=-1), SpaceMismatchError, "expected steps to be an integer"),
        (lambda: al.recurrence(lambda u, i: u[:1] + i, (2,), inputs=(4, 1)), SpaceMismatchError, "return a state in"),
        (lambda: al.recurrence(rotation, (2,), steps=3, outputs=True), SpaceMismatchError, "return u, o"),
        (
            lambda: al.recurrence(lambda u, i: u + i, (2,), inputs=(4, 2), steps=3), SpaceMismatchError,
            "4 in inputs, 3 in steps",
        ),
        (
            lambda: al.recurrence(lambda u, i: u + i, torch.ones(2), inputs=(4, 2)), SpaceMismatchError,
            "expected a state of zeros beside inputs",
        ),
        (lambda: al.recurrence(moving, (3,), xs=2.0), SpaceMismatchError, "expected xs to be tensors"),
        (lambda: al.recurrence(rotation, (2,), steps=2, final=False), SpaceMismatchError, "codomain of a recurrence"),
        (lambda: al.recurrence(lambda u: u + 0j, (2,), steps=2), SpaceMismatchError, "return a state in"),
        (lambda: al.recurrence(lambda u, i: u + i, (2,), steps=2), SpaceMismatchError, "argument: 'i': inputs="),
        (lambda: al.recurrence(rotation, (2,), inputs=(4, 2)), SpaceMismatchError, r"takes \(u, i\), .* too many"),
        # Steps that are linear at the first time alone.
        (
            lambda: al.recurrence(lambda u, x: u + x, (2,), xs=torch.tensor([[0.0, 0], [0, 0], [1, 1], [0, 0]])),
            NotLinearError, "at step 2 it is not",
        ),
        (
            lambda: al.recurrence(thresholded, (1,), xs=torch.tensor([[1.0], [1], [-1], [1]])), NotLinearError,
            "at step 2 it is not",
        ),
    ],
)  # fmt: skip
def test_what_is_no_recurrence_is_refused(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_learn_initial_is_another_name_of_initial() -> None:
    A = al.recurrence(lambda u, i: 0.5 * u + i, (3,), inputs=(4, 3), learn_initial=True)
    assert [spec.shape for spec in A.domain.specs] == [(3,), (4, 3)]
    with pytest.raises(al.SpaceMismatchError, match="one of initial and learn_initial"):
        al.recurrence(lambda u, i: 0.5 * u + i, (3,), inputs=(4, 3), learn_initial=True, initial=True)
