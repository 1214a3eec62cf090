"""The adjoint has no forward in it, and says what still reads the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from built import ops_of
from laws import call, draw, operator
from operator_zoo import BY_NAME
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adjointlab as al
from adjointlab.transpose.graph.ir import compiled
from adjointlab.transpose.passes.drop_forward import _shape_only, _take_running_statistics

pytestmark = pytest.mark.slow


def convolutions(ops: list[str]) -> int:
    return sum(name in ("aten::convolution", "aten::convolution_backward") for name in ops)


@pytest.mark.parametrize(
    ("layers", "options"), [(1, {}), (5, {}), (5, {"stride": 2}), (2, {"groups": 2}), (2, {"dilation": 2})], ids=str
)
def test_adjoint_of_a_chain_has_one_op_for_each_convolution(layers: int, options: dict[str, int]) -> None:
    chain = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=2, bias=False, **options) for _ in range(layers)])
    A = al.linear_operator(chain, (1, 2, 9, 8), engine="traced")
    y = draw(A.codomain)
    A.H(y)
    assert convolutions(ops_of(A.H, y)) <= layers


def test_account_of_a_chain_counts_one_op_for_each_convolution() -> None:
    chain = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(5)])
    A = al.linear_operator(chain, (1, 2, 9, 8), lowering=False)
    assert A.source.explanation.ops_after == {"convolution_backward": 5}
    assert "ops: 9 in the vector-Jacobian product, 5 in the adjoint" in A.explain()
    assert "convolution_backward(v, shape(1, 2, 9, 8), 4.weight" in A.explain()


def test_gradients_in_parameters_run_no_forward() -> None:
    A = al.linear_operator(nn.Conv2d(2, 3, 3, bias=False), (1, 2, 9, 8))
    x, y = draw(A.domain), draw(A.codomain)
    for out, cotangent in ((A(x), y), (A.H(y), x)):
        assert convolutions(ops_of(out.backward, cotangent)) == 1


def test_eager_adjoint_runs_the_forward() -> None:
    A = al.linear_operator(nn.Conv2d(1, 1, 3, bias=False), (1, 1, 5, 5), engine="eager")
    y = draw(A.codomain)
    A.H(y)
    assert convolutions(ops_of(A.H, y)) == 2


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("avg-pool2d", "aten::avg_pool2d"),
        ("adaptive-avg-pool2d", "aten::_adaptive_avg_pool2d"),
        ("pad2d-reflect", "aten::reflection_pad2d"),
        ("pad3d-replicate", "aten::replication_pad3d"),
        ("grid-sample-bilinear", "aten::grid_sampler_2d"),
        ("interpolate-bilinear", "aten::upsample_bilinear2d"),
        ("interpolate-bicubic", "aten::upsample_bicubic2d"),
        ("unfold", "aten::im2col"),
        ("rfft-7", "aten::_fft_r2c"),
        ("batch-norm3d-plain", "aten::native_batch_norm"),
    ],
)
def test_adjoint_has_no_forward_op(name: str, forward: str) -> None:
    entry = BY_NAME[name]
    function, _ = entry.build(torch.float64)
    A = operator(entry, torch.float64, "traced")
    x, y = draw(A.domain), draw(A.codomain)
    A.H(y)
    assert forward in ops_of(lambda: call(function, x))
    assert forward not in ops_of(A.H, y)


@pytest.mark.parametrize("size", [2, 0], ids=["saved", "not saved"])
def test_a_batch_norm_has_statistics_that_were_saved_from_its_buffers(size: int) -> None:
    """Kernels for CUDA save them in the forward, of which nothing is to be left, and read them in the backward."""
    graph, mode, statistics = fx.Graph(), FakeTensorMode(), torch.tensor([0.5, 2.0])
    v, x, mean, variance, *saved = (graph.placeholder(name) for name in ("v", "x", "mean", "variance", "a", "b"))
    for node, entries in ((mean, 2), (variance, 2), *[(node, size) for node in saved]):
        with mode:
            node.meta["val"] = torch.empty(entries)
    settings = (False, 1e-5, [True, False, False])  # in evaluation
    node = graph.call_function(
        torch.ops.aten.native_batch_norm_backward.default, (v, x, None, mean, variance, *saved, *settings)
    )
    _take_running_statistics(graph, node)
    assert _shape_only(node) == ((1,) if size else (1, 5, 6))
    assert [bool(each.users) for each in saved] == [size == 0, size == 0]
    if size:
        graph.output(node.args[5:7])
        graph.erase_node(node)
        found = compiled(graph)(None, None, 3 * statistics, statistics, None, None)
        assert torch.equal(found[0], 3 * statistics)
        assert torch.equal(found[1], (statistics + 1e-5).rsqrt())


def test_fourier_adjoint_is_one_transform() -> None:
    A = operator(BY_NAME["multi-coil-mri"], torch.complex128, "traced")
    y = draw(A.codomain)
    A.H(y)
    assert sum(name.startswith("aten::_fft") for name in ops_of(A.H, y)) == 1


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (torch.relu, "threshold_backward"),
        (torch.square, "mul"),
        (lambda x: x.softmax(-1), "_softmax_backward"),
        (lambda x: x.exp(), "mul"),
        (lambda x: x @ x.mT, "mm"),
    ],
    ids=["relu", "square", "softmax", "exp", "outer-square"],
)
def test_readers_are_named(function, op: str) -> None:
    report = al.check_linearity(function, (3, 4))
    assert any(op in reader for reader in report.reads_input), report.reads_input


@pytest.mark.parametrize(
    "function",
    [
        # The derivative at zero looks like that of a linear map; the value of x is read all the same.
        lambda x: torch.where(x > 1, 2 * x, x),
        lambda x: x * (x.detach() > 1),
        lambda x: x.masked_fill(x > 1, 0),
        lambda x: x * torch.zeros_like(x).add_(x.detach()),
        lambda x: x[x.argsort()],
        lambda x: x.index_select(0, x.argmax()[None]),
        lambda x: x * x.new_zeros(3).copy_(x.detach()).sign(),
        lambda x: x.clamp(-1, 1),
        F.hardtanh,
        lambda x: x.cumprod(0),
        lambda x: x.sort().values,
        lambda x: F.max_pool1d(x[None], 2),
        lambda x: x.max(),
        lambda x: F.grid_sample(x.expand(1, 1, 3, 3), x[:2].expand(1, 1, 3, 2), align_corners=False),
        lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x.expand(3, 3), per_sample_weights=x[None, :2], mode="sum"),
        lambda x: F.conv1d(x[None, None], x[None, None, :2]),
        lambda x: F.prelu(x, torch.full((1,), 0.5)),
    ],
    ids=range(17),
)
def test_reads_of_the_input_are_never_cut(function) -> None:
    assert al.check_linearity(function, (3,)).verdict != "proved"
