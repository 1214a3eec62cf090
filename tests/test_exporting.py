"""Programs that are written for PyTorch alone: what they compute, keep and refuse, in a process without adjointlab."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from built import needs_torch
from laws import Case
from operator_zoo import BY_NAME
from torch import Tensor, nn

import adjointlab as al
from adjointlab.numerics import UNITS, relative_gap
from adjointlab.transpose import Options, Transposition
from adjointlab.transpose.kernels.registry import transformed

ALONE = """
import sys
sys.modules["adjointlab"] = None  # as if it were not installed
import json, torch
from torch.utils import _pytree as pytree
name, found = sys.argv[1], {}
for case, (x, expected, wrong) in torch.load(name + "/cases.pt").items():
    run = torch.export.load(f"{name}/{case}.pt2").module()
    gaps = []
    for given, result in zip(x, expected):
        for a, b in zip(pytree.tree_leaves(run(given)), pytree.tree_leaves(result)):
            gaps.append(float((a - b).norm() / b.norm()))
    refused = []
    for given in wrong:
        try:
            run(given)
        except (AssertionError, RuntimeError, ValueError):
            refused.append(True)
        else:
            refused.append(False)
    found[case] = max(gaps), refused
assert [key for key in sys.modules if key.startswith("adjointlab")] == ["adjointlab"]
print(json.dumps(found))
"""


def conv(width: int, n: int, free: int = 0, batch: int = 1, **options: Any) -> al.LinearOperator:
    layer = nn.Conv2d(1, 1, width, padding=width // 2, bias=False, **options)
    return al.linear_operator(layer, (batch, 1, n, n), batch_dims=free)


def sense(n: int = 32, coils: int = 4) -> al.LinearOperator:
    maps = torch.randn(coils, n, n, dtype=torch.complex64)
    mask = (torch.rand(n, n) > 0.5).to(maps)
    space = al.TensorSpec((n, n), torch.complex64)
    return al.linear_operator(lambda x: mask * torch.fft.fft2(maps * x, norm="ortho"), space)


def gradient() -> Any:
    f = al.affine_operator(nn.Conv2d(1, 1, 5, padding=2), (1, 1, 16, 16))
    y = f.codomain.randn()
    return al.LeastSquares(f, y, weight=torch.rand_like(y)).gradient


def tree() -> al.LinearOperator:
    return al.linear_operator(lambda d: (2 * d["a"], d["b"].flip(0)), {"a": torch.zeros(3), "b": torch.zeros(4)})


def made(function: Callable[[Tensor], Tensor], *shape: int, free: int = 0, **options: Any) -> al.LinearOperator:
    """Return an operator with the kernels that options name, whatever is fastest at the moment."""
    source = Transposition(function, al.Space.of(shape, batch_dims=free), options=Options(**options))
    return al.LinearOperator.of_source(source, (made, (function, *shape)), {})


def first(native: Any, others: Callable[[], dict[Any, Any]], device: Any, beside: Any) -> Any:
    return next(iter(others()), None)


def spectral() -> al.LinearOperator:
    layer = nn.Conv2d(1, 1, 11, padding=5, padding_mode="circular", bias=False)
    return made(layer, 1, 1, 32, 32, choose=transformed)


def transforms(n: int) -> al.LinearOperator:
    factor = torch.randn(n, n // 2 + 1, dtype=torch.complex64)
    return al.linear_operator(lambda x: torch.fft.irfft2(factor * torch.fft.rfft2(x), (n, n)), (1, n, n), batch_dims=1)


def samples() -> al.LinearOperator:
    grid = 2 * torch.rand(1, 9, 11, 2) - 1

    def forward(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)

    return made(forward, 2, 1, 12, 12, free=1, choose_map=first)


# Each with the sizes of its batch, if that is free.
CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "spectrum": (lambda: spectral().H, ()),
    "reflect": (lambda: conv(5, 16, free=1, padding_mode="reflect").H, (1, 5, 64)),
    "samples": (lambda: samples().H, (1, 64)),
    "sense": (lambda: sense().H, ()),
    "algebra": (lambda: al.vstack([2 * conv(3, 16), conv(5, 16).gram]), ()),
    "gradient": (gradient, ()),
    "jacobian": (lambda: al.jacobian(nn.Sequential(nn.Linear(7, 5), nn.Tanh()), torch.randn(7)).H, ()),
    "tree": (lambda: tree().H, ()),
}


def domain_of(map_: Any) -> al.Space:
    return map_.__self__.A.domain if hasattr(map_, "__self__") else map_.domain


@pytest.mark.cpu
def test_in_a_process_without_adjointlab(tmp_path: Path) -> None:
    cases = {}
    for name, (make, sizes) in CASES.items():
        map_ = make()
        al.export(map_, tmp_path / f"{name}.pt2", batch=(1, 64) if sizes else None)
        space = domain_of(map_)
        x = [space.with_batch((n,)).randn() for n in sizes] or [space.randn()]
        with torch.no_grad():
            expected = [map_(each) for each in x]
        leaf = space.leaves(x[0])[0]
        others = [
            leaf.narrow(-1, 1, leaf.shape[-1] - 1),
            leaf.to(torch.complex128 if leaf.is_complex() else torch.half),
        ]
        wrong = [] if name == "tree" else others + ([space.with_batch((65,)).randn()] if sizes else [])
        cases[name] = x, expected, wrong
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == CASES.keys()
    for name, (gap, refused) in found.items():
        assert gap <= UNITS * torch.finfo(torch.float32).eps, name
        assert all(refused), name


@pytest.mark.parametrize(
    "name", ["conv2d-circular-stride", "istft", "interpolate-bilinear-antialias", "sparse-csr", "chain-with-norm"]
)
def test_operators_of_the_zoo(name: str, tmp_path: Path) -> None:
    entry = BY_NAME[name]
    A = Case(entry, entry.dtypes[-1], "traced").A
    al.export(A.H, tmp_path / "adjoint.pt2")
    y = A.codomain.randn()
    found = torch.export.load(tmp_path / "adjoint.pt2").module()(y)
    with torch.no_grad():
        assert relative_gap(A.domain.leaves(A.H(y)), A.domain.leaves(found)) <= UNITS * A.domain.eps


def problem(weight: str, *, affine: bool = False) -> al.LeastSquares:
    space = al.Space.of((1, 1, 12, 12), batch_dims=1, weight=torch.rand(12) + 0.5 if weight == "of spaces" else None)
    layer = nn.Conv2d(1, 1, 5, padding=2, bias=affine)
    A: Any = (al.affine_operator if affine else al.linear_operator)(layer, space, codomain=space, batch_dims=1)
    y = A.codomain.randn()
    weights = {"entries": torch.rand_like(y), "operator": 3 * al.identity(A.codomain)}
    penalties: list[Any] = [(0.1, al.finite_differences(A.domain))]
    penalties += [(torch.tensor([0.2]), al.identity(A.domain), A.domain.randn())]
    return al.LeastSquares(A, y, weights.get(weight), [] if weight == "of spaces" else penalties)


@pytest.mark.parametrize("weight", ["none", "entries", "operator", "of spaces"])
def test_a_gradient_of_any_batch_takes_the_data(weight: str, tmp_path: Path) -> None:
    F = problem(weight, affine=weight == "entries")
    al.export(F.gradient, tmp_path / "gradient.pt2", batch=(1, 16))
    run = torch.export.load(tmp_path / "gradient.pt2").module()
    for n in (1, 5, 16):
        x, y = (space.with_batch((n,)).randn() for space in (F.A.domain, F.A.codomain))
        with torch.no_grad():
            found = run((x, y))
            parts = [F.gradient_for(*pair) for pair in zip(x.split(1), y.split(1), strict=True)]
        assert relative_gap((torch.cat(parts),), (found,)) <= UNITS * F.A.domain.eps
    for wrong in ((x, y[:3]), (x, y.double())):
        with pytest.raises((AssertionError, RuntimeError)):
            run(wrong)


def operations(path: Path) -> list[str]:
    return [str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"]


@pytest.mark.cpu
def test_the_kernels_are_those_of_the_operator(tmp_path: Path) -> None:
    al.export(spectral().H, tmp_path / "map.pt2")
    found = " ".join(operations(tmp_path / "map.pt2"))
    assert "_fft_r2c" in found
    assert "convolution" not in found
    al.export(samples().H, tmp_path / "map.pt2", batch=(1, 9))
    found = " ".join(operations(tmp_path / "map.pt2"))
    assert "sparse_csr" in found
    assert "grid_sampler" not in found


@pytest.mark.cpu
@needs_torch("2.13", "a call checks sizes")
def test_sizes_are_refused_without_the_call_of_a_module(tmp_path: Path) -> None:
    al.export(conv(3, 8, free=1).H, tmp_path / "adjoint.pt2", batch=(1, 4))
    adjoint = torch.export.load(tmp_path / "adjoint.pt2").module().forward
    for wrong in (
        torch.randn(5, 1, 8, 8),
        torch.randn(2, 1, 7, 8),
        torch.randn(1, 8, 8),
        torch.randn(2, 1, 8, 8).double(),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|dtype mismatch"):
            adjoint(wrong)


@pytest.mark.slow
@pytest.mark.cpu
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@needs_torch("2.13", "a package refuses batches of one")
@pytest.mark.parametrize(
    "make", [lambda: conv(3, 16, free=1).H, lambda: transforms(16).H], ids=["convolution", "transforms"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_package_refuses_what_the_program_does(
    make: Callable[[], al.LinearOperator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    A = make()
    al.export(A, tmp_path / "map.pt2", batch=(1, 8))
    program = torch.export.load(tmp_path / "map.pt2")
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "compiled.pt2"),
        inductor_configs={"aot_inductor.check_lowerbound": False},
    )  # fmt: skip
    run = torch._inductor.aoti_load_package(package)
    for n in (1, 5, 8):
        x = A.domain.with_batch((n,)).randn()
        with torch.no_grad():
            assert relative_gap(A.codomain.leaves(A(x)), A.codomain.leaves(run(x))) <= UNITS * A.domain.eps
    for wrong in (x.double(), x[..., 1:].contiguous(), torch.cat([x, x])):
        with pytest.raises(RuntimeError, match="input_handles"):
            run(wrong)


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: conv(5, 16, free=1, padding_mode="reflect").H,
        lambda: conv(3, 16, free=1, stride=2).H,
        lambda: al.linear_operator(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 1, 4, 4),
                                   batch_dims=1),
        lambda: al.linear_operator(lambda x: x[..., ::2].flip(-1).cumsum(-1), (2, 6), batch_dims=1).H,
        lambda: sense(8).H.real_view,
    ],
    ids=["reflect", "stride", "interpolate", "slices", "sense"],
)  # fmt: skip
def test_onnx_where_it_has_the_operations(make: Callable[[], al.LinearOperator], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    A = make()
    al.export(A, tmp_path / "map.pt2", batch=(1, 8) if A.domain.batch_dims else None)
    file = str(tmp_path / "map.onnx")
    torch.onnx.export(torch.export.load(tmp_path / "map.pt2"), (), file, dynamo=True, verbose=False)
    run = evaluator(file)
    for n in (1, 5):
        x = A.domain.with_batch((n,)[: A.domain.batch_dims]).randn()
        found = run.run(None, {run.input_names[0]: x.numpy()})
        with torch.no_grad():
            assert relative_gap(A.codomain.leaves(A(x)), tuple(map(torch.from_numpy, found))) <= 64 * A.domain.eps


def test_numbers_are_those_of_the_export(tmp_path: Path) -> None:
    A = conv(3, 8)
    x = A.domain.randn()
    al.export(A, tmp_path / "map.pt2")
    with torch.no_grad():
        before = A(x)
        A.module.weight.mul_(2)
    run = torch.export.load(tmp_path / "map.pt2").module()
    torch.testing.assert_close(run(x), before)
    al.export(A, tmp_path / "map.pt2")  # the file is replaced
    torch.testing.assert_close(torch.export.load(tmp_path / "map.pt2").module()(x), 2 * before)


def test_inputs_may_lie_in_memory_as_they_like(tmp_path: Path) -> None:
    every_second = al.linear_operator(lambda x: torch.as_strided(x, (4,), (2,)), (8,))
    al.export(every_second, tmp_path / "strided.pt2")
    run = torch.export.load(tmp_path / "strided.pt2").module()
    x = torch.randn(16)
    torch.testing.assert_close(run(x[4:12]), x[4:12:2])
    torch.testing.assert_close(run(x[::2]), x[::4])
    parts = al.linear_operator(torch.view_as_real, al.TensorSpec((5,), torch.complex64))
    al.export(parts, tmp_path / "parts.pt2")
    z = torch.randn(5, dtype=torch.complex64)
    torch.testing.assert_close(torch.export.load(tmp_path / "parts.pt2").module()(z.conj())[..., 1], -z.imag)


def test_an_export_leaves_the_operator_as_it_was(tmp_path: Path) -> None:
    A = conv(5, 16, free=1)
    before, draws = A.explain(), torch.get_rng_state()
    al.export(A.H, tmp_path / "adjoint.pt2", batch=(1, 8))
    assert A.explain() == before
    assert torch.equal(torch.get_rng_state(), draws)
    A.H(A.codomain.randn()).sum().backward()
    assert A.module.weight.grad is not None
    assert [file.name for file in tmp_path.iterdir()] == ["adjoint.pt2"]


def test_another_thread_meanwhile_has_derivatives(tmp_path: Path) -> None:
    A = conv(3, 8)
    inside, done, seen = threading.Event(), threading.Event(), []

    def pause(x: Tensor) -> Tensor:
        inside.set()
        done.wait(30)
        return 2 * x

    def other() -> None:
        inside.wait(30)
        seen.append(A(A.domain.zeros()).requires_grad)
        done.set()

    twice = al.LinearOperator(pause, lambda x: 2 * x, A.codomain, A.codomain)
    thread = threading.Thread(target=other)
    thread.start()
    al.export(twice @ A, tmp_path / "product.pt2")
    thread.join()
    assert seen == [True]


def test_a_range_may_begin_anywhere_and_several_dimensions_be_free(tmp_path: Path) -> None:
    def flipped(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * x.shape[1], -1).flip(1).reshape(x.shape)

    A = al.linear_operator(flipped, (2, 3, 4), batch_dims=2)
    al.export(A, tmp_path / "map.pt2", batch=(4, 9))
    run = torch.export.load(tmp_path / "map.pt2").module()
    for batch in ((4, 9), (9, 4), (5, 5)):
        x = torch.randn(*batch, 4)
        torch.testing.assert_close(run(x), x.flip(-1))
    for batch in ((3, 4), (4, 10)):
        with pytest.raises((AssertionError, RuntimeError), match=r"size|shape"):
            run(torch.randn(*batch, 4))


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.flip(x.detach().numpy()).copy())


def space(n: int = 4) -> al.Space:
    return al.Space.of((n,))


def averaged() -> al.LinearOperator:  # which has as many parts as the batch
    return al.linear_operator(
        lambda x: sum(row * (i + 1) for i, row in enumerate(x))[None] + 0 * x, (3, 4), batch_dims=1
    )


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("make", "batch", "error", "message"),
    [
        (lambda: al.from_pair(through_numpy, through_numpy, (4,), (4,)), None,
         al.NotExportableError, "goes through NumPy"),
        (lambda: al.LinearOperator(lambda x: x + through_numpy(x), lambda x: x, space(), space()), None,
         al.NotExportableError, "off by .* leaves PyTorch"),
        (lambda: al.linear_operator(nn.Linear(4, 4, bias=False), (4,), engine="eager").H, None,
         al.NotExportableError, r"runs Python code of its own \(it was asked for\): build it with engine='auto'"),
        (averaged, (1, 8), al.NotExportableError, "got other operations at another size: export one program for each"),
        (lambda: conv(3, 8), (1, 8), al.SpaceMismatchError, "one of fixed sizes: build it with batch_dims=1"),
        (lambda: conv(3, 8, free=1), (8, 1), al.SpaceMismatchError, "1 ≤ smallest < largest, got"),
        (lambda: conv(3, 8, free=1), 8, al.SpaceMismatchError, "two sizes, got 8"),
        (lambda: al.LeastSquares(conv(3, 8, free=1), torch.zeros(2, 1, 8, 8)).gradient, (1, 8),
         al.SpaceMismatchError, "build F with data of batch size 1"),
        (lambda: nn.Linear(2, 2), None, al.SpaceMismatchError, "got Linear: wrap a module"),
    ],
)  # fmt: skip
def test_refusals_leave_the_file_as_it_was(
    make: Callable[[], Any], batch: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "map.pt2"
    file.write_text("an older one")
    with pytest.raises(error, match=message):
        al.export(make(), file, batch=batch)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older one"]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [("map.pt", ValueError, "ends with .pt2"), ("none/map.pt2", FileNotFoundError, "in a folder that exists")],
)
def test_paths_that_cannot_be_written(path: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        al.export(al.identity((3,)), tmp_path / path)


def _into_product(x: Tensor) -> Tensor:
    z = torch.zeros(4) * 0.5
    z[1] += x[0]
    return z


def _into_clone(x: Tensor) -> Tensor:
    z = torch.arange(4.0)
    w = (0 * z).clone()
    w[1:3] += 0 * z[1:3]
    w[2:] = x[:2]
    return w + x


@pytest.mark.parametrize("f", [_into_product, _into_clone])
def test_forwards_that_write_into_constants(f: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    A = al.linear_operator(f, (4,))
    for B in (A, A.H):
        al.export(B, tmp_path / "map.pt2")
        run = torch.export.load(tmp_path / "map.pt2").module()
        for _ in range(3):  # the same at each call: nothing is left in what was written to
            x = B.domain.randn()
            assert torch.equal(run(x), B(x))


@pytest.mark.cpu
def test_maps_that_cannot_be_traced_are_refused(tmp_path: Path) -> None:
    pair = al.from_pair(lambda x: 2 * x, lambda y: 2 * y, (4,), (4,), arrays="numpy")
    for A in (pair, al.diagonal(torch.arange(1.0, 5)).inverse(al.solvers.cgls)):
        with pytest.raises(al.NotExportableError, match="expected a map that can be traced, but: "):
            al.export(A, tmp_path / "map.pt2")
    assert not list(tmp_path.iterdir())
