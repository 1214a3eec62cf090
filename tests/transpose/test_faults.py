"""Faults that reviews found, each with the right value: what an operator depends on, crashes, and what was refused."""

import copy
import functools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from built import needs_torch
from torch import nn
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch.utils.flop_counter import FlopCounterMode

import adjointlab as al
from adjointlab.errors import NotLinearError, SpaceMismatchError

DOUBLE = torch.float64
SPACE = al.TensorSpec((3,), DOUBLE)
ONES = torch.ones(3, dtype=DOUBLE)


class Switched(nn.Module):
    """Twice the input, and what ``extra`` adds once it is switched on."""

    def __init__(self, extra):
        super().__init__()
        self.extra, self.on = extra, False

    def forward(self, x):
        return 2 * x + self.extra(x) if self.on else 2 * x


class Gated(nn.Module):
    """The input and its positive part, times a gate that is closed at first."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros((), dtype=DOUBLE))

    def forward(self, x):
        return x + self.gate * x.relu()


def changed(module, change, **options):
    operator = al.linear_operator(module, SPACE, **options)
    operator(ONES), operator.H(ONES)
    with torch.no_grad():
        change(module)
    return operator


def zero_bias():
    module = nn.Linear(3, 3).double()
    nn.init.zeros_(module.bias)
    return module


ENGINES = pytest.mark.parametrize("engine", ["auto", "eager"])
CHANGES = {
    "PReLU": (lambda: nn.PReLU(init=1.0).double(), lambda m: m.weight.fill_(0.1)),
    "PReLU, by .data": (lambda: nn.PReLU(init=1.0).double(), lambda m: m.weight.data.fill_(0.1)),
    "PReLU, by NumPy": (lambda: nn.PReLU(init=1.0).double(), lambda m: m.weight.detach().numpy().fill(0.1)),
    "LeakyReLU": (lambda: nn.LeakyReLU(1.0), lambda m: setattr(m, "negative_slope", 0.1)),
    "gate": (Gated, lambda m: m.gate.fill_(1)),
    "gate, by .data": (Gated, lambda m: m.gate.data.fill_(1)),
    "zero bias": (zero_bias, lambda m: m.bias.fill_(1)),
    "bias": (lambda: Switched(lambda x: 1), lambda m: setattr(m, "on", True)),
    "round": (lambda: Switched(lambda x: x.round()), lambda m: setattr(m, "on", True)),
}


class TestMapsThatAreLinearForSomeParametersOnly:
    @ENGINES
    @pytest.mark.parametrize("case", CHANGES)
    def test_a_change_is_judged(self, case, engine):
        make, change = CHANGES[case]
        operator = changed(make(), change, engine=engine)
        for call in (operator, operator.H):
            with pytest.raises(NotLinearError, match="has changed, and is not linear any more"):
                call(ONES)

    def test_a_hidden_part_is_judged(self):
        operator = changed(Switched(lambda x: x.detach()), lambda m: setattr(m, "on", True))
        with pytest.raises(al.errors.NotDifferentiableError, match=r"\.detach\(\) hides it"):
            operator.H(ONES)

    @ENGINES
    def test_a_change_that_is_undone_is_fine(self, engine):
        module = nn.PReLU(init=1.0).double()
        operator = changed(module, lambda m: m.weight.fill_(0.1), engine=engine)
        with pytest.raises(NotLinearError, match="has changed"):
            operator(ONES)
        with torch.no_grad():
            module.weight.fill_(1)
        assert torch.equal(operator.H(-ONES), -ONES)

    def test_a_new_batch_size_is_judged_after_a_change(self):
        module = nn.PReLU(init=1.0).double()
        operator = al.linear_operator(module, al.TensorSpec((1, 3), DOUBLE), batch_dims=1)
        with torch.no_grad():
            module.weight.fill_(0.1)
        with pytest.raises(NotLinearError, match="has changed"):
            operator(torch.ones(2, 3, dtype=DOUBLE))

    def test_proved_maps_are_not_judged_again(self):
        runs = []

        class Counted(nn.Linear):
            def forward(self, x):
                runs.append(1) if not torch.compiler.is_compiling() else None
                return super().forward(x)

        module = Counted(3, 3, bias=False, dtype=DOUBLE)
        operator = al.linear_operator(module, SPACE)
        before = len(runs)
        with torch.no_grad():
            module.weight.mul_(2)
        torch.testing.assert_close(operator.H(ONES), module.weight.T @ ONES)
        assert len(runs) == before


class TestTensorsAreReadWhereTheyAreHeld:
    @pytest.mark.parametrize("replaced", ["first", "second"])
    def test_tied_weights_that_are_untied(self, replaced):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = self.second = nn.Parameter(torch.randn(3, 3, dtype=DOUBLE))

            def forward(self, x):
                return self.second @ (self.first @ x)

        module = Tied()
        operator = al.linear_operator(module, SPACE)
        setattr(module, replaced, nn.Parameter(torch.randn(3, 3, dtype=DOUBLE)))
        matrix = (module.second @ module.first).detach()
        torch.testing.assert_close(operator(ONES).detach(), matrix @ ONES)
        torch.testing.assert_close(operator.H(ONES).detach(), matrix.T @ ONES)

    def test_parameters_of_a_closure_can_be_replaced(self):
        weight, other = nn.Parameter(torch.randn(3, 3, dtype=DOUBLE)), torch.randn(3, 3, dtype=DOUBLE)
        operator = al.linear_operator(lambda x: weight @ x, SPACE)
        assert list(operator.state_dict()) == ["parameter_0"]
        replaced = {"parameter_0": other}
        torch.testing.assert_close(torch.func.functional_call(operator, replaced, (ONES,)), other @ ONES)
        torch.testing.assert_close(torch.func.functional_call(operator.H, replaced, (ONES,)), other.T @ ONES)
        torch.testing.assert_close(operator(ONES).detach(), (weight @ ONES).detach())
        operator.load_state_dict(replaced, assign=True)
        torch.testing.assert_close(operator(ONES).detach(), other @ ONES)
        torch.testing.assert_close(operator.H(ONES).detach(), other.T @ ONES)

    def test_gradients_reach_what_replaces_the_parameter_of_a_closure(self):
        weight, other = nn.Parameter(torch.randn(3, 3, dtype=DOUBLE)), torch.randn(3, 3, dtype=DOUBLE)
        operator = al.linear_operator(lambda x: weight @ x, SPACE)
        found = torch.func.grad(lambda w: torch.func.functional_call(operator, {"parameter_0": w}, (ONES,)).sum())(
            other
        )
        torch.testing.assert_close(found, torch.ones_like(other))

    def test_the_eager_engine_says_that_it_cannot_replace_them(self):
        weight = nn.Parameter(torch.randn(3, 3, dtype=DOUBLE))
        operator = al.linear_operator(lambda x: weight @ x, SPACE, engine="eager")
        names = [name for name, _ in operator.named_parameters()]
        for name in names:
            operator.load_state_dict({name: torch.randn(3, 3, dtype=DOUBLE)}, assign=True)
            with pytest.raises(SpaceMismatchError, match="was replaced"):
                operator(ONES)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
    @pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
    def test_sparse_buffers_are_read_where_they_are_held(self, layout):
        class Projection(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("matrix", torch.eye(3, dtype=DOUBLE).to_sparse(layout=layout))

            def forward(self, x):
                return (self.matrix @ x.unsqueeze(-1)).squeeze(-1)

        module = Projection()
        operator = al.linear_operator(module, SPACE)
        assert torch.equal(operator.H(ONES), ONES)
        module.matrix = (2 * torch.eye(3, dtype=DOUBLE)).to_sparse(layout=layout)
        assert torch.equal(operator.H(ONES), 2 * ONES)

    def test_numbers_read_from_a_buffer_are_compared_under_a_dispatch_mode(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("k", torch.tensor(2.0, dtype=DOUBLE))

            def forward(self, x):
                return x * self.k.item()

        module = Scaled()
        operator = al.linear_operator(module, SPACE)
        module.k.fill_(5.0)
        with FlopCounterMode(display=False):
            assert torch.equal(operator(ONES), 5 * ONES)
            assert torch.equal(operator.H(ONES), 5 * ONES)

    def test_tensors_can_be_swapped_after_a_build(self):
        module = nn.Linear(3, 3, bias=False).double()
        operator = al.linear_operator(module, SPACE)
        assert not weakref.getweakrefs(module.weight)
        torch.utils.swap_tensors(module.weight, nn.Parameter(torch.randn(3, 3, dtype=DOUBLE)))
        torch.testing.assert_close(operator.H(ONES), module.weight.T @ ONES)


class Calibrated(nn.Module):
    """Divides by what the first call saw."""

    def __init__(self):
        super().__init__()
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.abs().max() + 1
        return x / self.scale


class Caching(nn.Module):
    """Keeps what it makes at the first call, which does not depend on the input."""

    def __init__(self):
        super().__init__()
        self.window, self.known = None, {}

    def forward(self, x):
        if self.window is None:
            self.window = torch.arange(3, dtype=x.dtype)
        if len(x) not in self.known:
            self.known[len(x)] = 2 * torch.ones(len(x), dtype=x.dtype)
        return x * self.window * self.known[len(x)]


OUTPUTS = {"two": lambda x: (x, x), "dict": lambda x: {"a": x}, "shape": lambda x: x[:2]}


class TestStateInPython:
    def test_a_module_that_calibrates_itself_is_not_linear(self):
        module = Calibrated()
        with pytest.raises(NotLinearError, match="is not"):
            al.linear_operator(module, SPACE)
        assert module.scale is None

    def test_a_module_that_is_calibrated_is_linear(self):
        module = Calibrated()
        module(ONES)
        operator = al.linear_operator(module, SPACE)
        assert torch.equal(operator.H(ONES), ONES / 2)

    @ENGINES
    def test_what_a_call_keeps_is_no_state(self, engine):
        module = Caching()
        operator = al.linear_operator(module, SPACE, engine=engine)
        assert module.window is None or engine == "eager"
        module(ONES)
        assert torch.equal(operator.H(ONES), torch.tensor([0.0, 2.0, 4.0], dtype=DOUBLE))
        module.window = torch.ones(3, dtype=DOUBLE)
        assert torch.equal(operator.H(ONES), 2 * ONES)
        assert al.check_linearity(Caching(), SPACE).verdict == "proved"

    @pytest.mark.parametrize("closed", [True, False])
    def test_a_function_that_counts_its_calls_is_never_proved(self, closed):
        calls = [0]

        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                return x if self.calls < 50 else x.abs()

        def counting(x):
            calls[0] += 1
            return x if calls[0] < 50 else x.abs()

        assert al.check_linearity(counting if closed else Counting(), SPACE).verdict == "supported"

    @ENGINES
    @pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
    def test_outputs_of_another_structure_are_refused(self, output, engine):
        class Varying(nn.Module):
            on = False

            def forward(self, x):
                return output(x) if self.on else 1 * x

        module = Varying()
        operator = al.linear_operator(module, SPACE, engine=engine)
        module.on = True
        with pytest.raises(SpaceMismatchError, match="build the operator anew"):
            operator(ONES)
        with pytest.raises(SpaceMismatchError, match="build the operator anew"):
            operator.H(ONES)


class Cumulated(torch.autograd.Function):
    """Sums from the left through NumPy, whose backward autograd cannot differentiate."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.cumsum(x.detach().numpy()))

    @staticmethod
    def backward(ctx, v):
        return torch.from_numpy(np.cumsum(v.detach().numpy()[::-1])[::-1].copy())


class TestDerivativesOfWhatAutogradCannotDifferentiateTwice:
    def test_gradient_of_a_step(self):
        operator = al.linear_operator(Cumulated.apply, SPACE, engine="eager")
        z = ONES.clone().requires_grad_()
        (z - 0.1 * operator.H(operator(z))).sum().backward()
        torch.testing.assert_close(z.grad, torch.tensor([0.4, 0.5, 0.7], dtype=DOUBLE))

    @pytest.mark.parametrize("affine", [False, True])
    def test_to_the_third_order(self, affine):
        def f(x):
            return Cumulated.apply(x) + 1 if affine else Cumulated.apply(x)

        build = al.affine_operator if affine else al.linear_operator
        operator = build(f, SPACE, engine="eager")
        assert torch.autograd.gradcheck(operator, ONES.clone().requires_grad_())
        assert torch.autograd.gradcheck(operator.H, ONES.clone().requires_grad_())
        assert torch.autograd.gradgradcheck(lambda x: operator.H(operator(x) ** 2), ONES.clone().requires_grad_())

    def test_least_squares(self):
        operator = al.linear_operator(Cumulated.apply, SPACE)
        z = ONES.clone().requires_grad_()
        al.LeastSquares(operator, torch.zeros(3, dtype=DOUBLE)).gradient(z).sum().backward()
        torch.testing.assert_close(z.grad, torch.tensor([6.0, 5.0, 3.0], dtype=DOUBLE))

    def test_gradients_in_parameters_are_those_of_autograd(self):
        weight = torch.randn(3, 3, dtype=DOUBLE, requires_grad=True)
        operator = al.linear_operator(lambda x: weight @ x, SPACE, engine="eager")
        assert torch.autograd.gradcheck(lambda x, _: operator.H(operator(x)), (ONES.clone().requires_grad_(), weight))


@torch.jit.script
def scripted(x):
    return x * torch.tensor([1.0, 2.0, 3.0])


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = 2 * torch.ones(3)

    def forward(self, x):
        return x * torch.tensor([1.0, 2.0, 3.0]) * self.weight


WINDOWS: dict[int, torch.Tensor] = {}


def cached_in_a_global(x):
    if len(x) not in WINDOWS:
        WINDOWS[len(x)] = torch.hann_window(len(x), dtype=x.dtype)
    return x * WINDOWS[len(x)]


@functools.lru_cache
def window(n):
    return torch.hann_window(n, dtype=DOUBLE)


class TestNothingBreaks:
    @pytest.mark.parametrize("f", [scripted, torch.jit.script(Scripted())], ids=["function", "module"])
    def test_scripted_constants(self, f):
        operator = al.linear_operator(f, (3,))
        assert torch.equal(operator.H(torch.ones(3)), f(torch.ones(3)))

    def test_scripted_code_behind_a_branch(self):
        size = torch.tensor(3)
        operator = al.linear_operator(lambda x: scripted(x) if size > 2 else x, (3,))
        assert operator.engine == "traced"
        assert torch.equal(operator.H(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0]))

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: torch.nested.as_nested_tensor([x[:2], x]),
            lambda x: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([x[:2], x]), 0.0),
        ],
        ids=["output", "inside"],
    )
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
    def test_nested_tensors(self, f, request):
        if request.node.callspec.id == "output":
            with pytest.raises(SpaceMismatchError, match="nested"):
                al.linear_operator(f, SPACE)
        else:
            assert al.check_adjoint(al.linear_operator(f, SPACE)).passed

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
    def test_nested_domain(self):
        with pytest.raises(SpaceMismatchError, match="nested"):
            al.linear_operator(lambda x: 2 * x, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))

    @pytest.mark.parametrize("f", [cached_in_a_global, lambda x: x * window(len(x))], ids=["global", "lru_cache"])
    def test_caches_hold_real_tensors(self, f):
        operator = al.linear_operator(f, al.TensorSpec((5,), DOUBLE))
        expected = torch.hann_window(5, dtype=DOUBLE)
        for found in (operator.H(torch.ones(5, dtype=DOUBLE)), f(torch.ones(5, dtype=DOUBLE))):
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, expected)

    @pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # by torch.func.linearize
    def test_a_linearized_function(self):
        _, push = torch.func.linearize(torch.sin, ONES)
        operator = al.linear_operator(push, SPACE)
        torch.testing.assert_close(operator.H(ONES), ONES.cos())
        torch.testing.assert_close(push(ONES), ONES.cos())

    def test_modes_in_turn_with_other_batch_sizes(self):
        module = nn.Sequential(nn.Conv1d(1, 2, 3, bias=False), nn.Dropout(0.5)).double().eval()
        operator = al.linear_operator(module, al.TensorSpec((1, 1, 8), DOUBLE), batch_dims=1)
        for size in (2, 3, 2):
            module.train()
            with pytest.raises(NotLinearError, match="has changed"):
                operator(torch.ones(size, 1, 8, dtype=DOUBLE))
            module.eval()
            assert operator(torch.ones(size, 1, 8, dtype=DOUBLE)).shape == (size, 2, 6)
            assert operator.engine == "traced"
            assert "engine: traced" in operator.explain()


def pooled(x):
    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(lambda c: torch.fft.fft(c * x), [1.0, 2.0])))


HARD = {
    "threads": (pooled, al.TensorSpec((5,), torch.complex128)),
    "torch.compile": (torch.compile(lambda x: x.cumsum(0), backend="eager"), SPACE),
    "cond": (lambda x: torch.cond(torch.tensor(True), lambda y: 2 * y, lambda y: 3 * y, (x,)), SPACE),
    "scan": (lambda x: scan(lambda c, y: (c + y, c + y), torch.zeros((), dtype=DOUBLE), x)[1], SPACE),
    "map": (lambda x: torch_map(lambda y: 2 * y, x), SPACE),
    "zero is special": (lambda x: x.cumsum(0) if x.any() else torch.zeros_like(x), SPACE),
}


NO_SCAN = needs_torch("2.10", "scan has no derivative")
CASES = [pytest.param(case, marks=NO_SCAN) if case == "scan" else case for case in HARD]


# torch.compile, which torch.cond and its kind use, looks at what it is not to look at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
class TestWhatAutogradCanDo:
    @pytest.mark.parametrize(
        "case",
        [*list(HARD)[:-3], pytest.param("scan", marks=needs_torch("2.10", "scan has no derivative")), *list(HARD)[-2:]],
    )
    @pytest.mark.slow
    def test_has_an_adjoint_and_a_reason(self, case):
        f, domain = HARD[case]
        operator = al.linear_operator(f, domain)
        assert operator.engine == "traced" or "reason: " in operator.explain()
        assert al.check_adjoint(operator).passed

    @pytest.mark.slow
    def test_a_hessian_by_two_gradients(self):
        w = torch.randn(3, dtype=DOUBLE)

        def product(v, *, create_graph):
            z = w.clone().requires_grad_()
            (g,) = torch.autograd.grad(z.sin().sum() + z.prod(), z, create_graph=True)
            return torch.autograd.grad(g, z, v, create_graph=create_graph)[0]

        seen = functools.partial(product, create_graph=True)
        unseen = functools.partial(product, create_graph=False)
        with pytest.raises(al.errors.NotDifferentiableError, match="an output that autograd does not see"):
            al.linear_operator(unseen, SPACE)
        for operator in (al.linear_operator(seen, SPACE), al.linear_operator(unseen, SPACE, derivative="forward")):
            torch.testing.assert_close(operator.H(ONES), seen(ONES).detach())


class Image:
    """Data with the spacing of its samples."""

    def __init__(self, data, spacing):
        self.data, self.spacing = data, spacing


class TestMessages:
    @pytest.mark.parametrize(
        ("f", "name"),
        [
            (lambda x: x.clamp(0, 1), "clamp"),
            (torch.nn.functional.hardtanh, "hardtanh"),
            (torch.relu, "threshold_backward"),
        ],
        ids=["clamp", "hardtanh", "relu"],
    )
    def test_the_operation_is_named_as_it_was_written(self, f, name):
        with pytest.raises(NotLinearError, match=f"depends on the input through {name}"):
            al.linear_operator(f, SPACE)

    def test_repeated_indices_are_named(self):
        index = torch.tensor([0, 0, 1])

        def f(x):
            out = torch.zeros(2, dtype=DOUBLE)
            out[index] = x
            return out

        with pytest.raises(al.errors.NotDifferentiableError, match="an assignment to indices that repeat"):
            al.linear_operator(f, SPACE)

    def test_out_is_named(self):
        def f(x):
            out = torch.empty_like(x)
            torch.mul(x, 2, out=out)
            return out

        with pytest.raises(al.errors.NotDifferentiableError, match=r"out=.* arguments don't support"):
            al.linear_operator(f, SPACE)


class TestLeavesAndObjects:
    @ENGINES
    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("scale", [1e2, 1e4, 1e6, 1e7])
    @pytest.mark.slow
    def test_a_large_leaf_hides_no_small_one(self, scale, dtype, engine):
        domain = al.TensorSpec((50,), dtype)
        with pytest.raises(NotLinearError, match="is not"):
            al.linear_operator(lambda z: (scale * z, z.relu()), domain, engine=engine)
        for f, of in ((lambda z: (scale * z, z), domain), (lambda a, b: scale * a + b, (domain, domain))):
            operator = al.linear_operator(f, of, engine=engine)
            assert operator.engine == ("traced" if engine == "auto" else engine), operator.explain()

    @ENGINES
    def test_a_wrong_part_of_an_adjoint_is_found_beside_a_large_leaf(self, engine):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z):
                return 1.0 * z

            @staticmethod
            def backward(ctx, v):
                return -v

        with pytest.raises(al.errors.NotDifferentiableError, match="the dot test fails"):
            al.linear_operator(lambda z: (1e7 * z, Wrong.apply(z)), SPACE, engine=engine)
        with pytest.raises(al.errors.NotDifferentiableError, match="the dot test fails"):
            al.linear_operator(lambda a, b: 1e7 * a + Wrong.apply(b), (SPACE, SPACE), engine=engine)

    def test_objects_with_other_attributes_are_other_elements(self):
        operator = al.linear_operator(lambda image: image.data * image.spacing, Image(ONES, 2.0))
        assert torch.equal(operator(Image(ONES, 2.0)), 2 * ONES)
        with pytest.raises(SpaceMismatchError, match="expected x to be an element"):
            operator(Image(ONES, 3.0))

    def test_integers_are_no_reason_to_move_an_operator(self):
        operator = al.linear_operator(lambda x: 2 * x, SPACE)
        with pytest.raises(SpaceMismatchError, match=r"convert it with \.to\(torch\.float64\)$"):
            operator(torch.ones(3, dtype=torch.int64))


def scattered(x):
    return torch.as_strided_scatter(x.new_zeros(6), x, (3,), (2,), 1)


@ENGINES
class TestFoundByFuzzing:
    @pytest.mark.parametrize("again", [copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))], ids=["copy", "pickle"])
    def test_copies_are_judged_as_well(self, again, engine):
        module = nn.Sequential(nn.Dropout(), nn.Linear(64, 4, bias=False)).eval()
        operator = again(al.linear_operator(module, (64,), engine=engine))
        operator.module.train()
        with pytest.raises(NotLinearError, match="has changed"):
            operator(torch.ones(64))

    @pytest.mark.parametrize("f", [scattered, lambda x: x.as_strided((2,), (1,), 1)], ids=["scatter", "view"])
    def test_views_into_a_larger_memory(self, f, engine):
        operator = al.linear_operator(f, SPACE, engine=engine)
        for side in (operator, operator.H):
            size = side.domain.specs[0].shape[0]
            rows = torch.randn(2, size, dtype=DOUBLE)
            torch.testing.assert_close(side(rows[1]), side(rows[1].clone()), rtol=0, atol=0)
        assert al.check_adjoint(operator).passed

    @pytest.mark.slow
    def test_a_few_random_numbers_are_not_the_same_by_chance(self, engine):
        for seed in range(40):
            torch.manual_seed(seed)
            with pytest.raises(NotLinearError, match="random"):
                al.linear_operator(nn.Dropout(), al.TensorSpec((4,), DOUBLE), engine=engine)

    def test_what_cancels_a_constant_is_linear(self, engine):
        net = nn.Linear(5, 4, dtype=DOUBLE)
        operator = al.linear_operator(
            lambda x: net(x) - net(torch.zeros_like(x)), al.TensorSpec((5,), DOUBLE), engine=engine
        )
        torch.testing.assert_close(operator.H(torch.ones(4, dtype=DOUBLE)), net.weight.sum(0))

    def test_complex_zeros_written_in_place(self, engine):
        def f(x):
            y = 2 * x
            y[-1].zero_()
            return y

        operator = al.linear_operator(f, al.TensorSpec((3, 2), torch.complex128), engine=engine)
        assert operator.engine == ("traced" if engine == "auto" else engine)
        assert al.check_adjoint(operator).passed

    def test_what_normalises_inside_is_linear(self, engine):
        blur = nn.Conv2d(1, 1, 3, bias=False)

        def f(x):
            return (blur(0.2 * x + 0.5) - blur(torch.full_like(x, 0.5))) / 0.2

        operator = al.linear_operator(f, (1, 1, 16, 16), engine=engine)
        assert al.check_adjoint(operator).passed
        wrong = operator.H

        def off(y):
            return wrong(y) * 1.001

        assert not al.check_adjoint(operator, adjoint=off).passed
