"""Convolutions of arrays that are split among processes equal the convolution of the whole."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel import ENGINES, alike, assert_close, assert_equals_single, assert_same_everywhere, mesh_of, seeded
from processes import Group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import adjointlab as al
from adjointlab import distributed

pytestmark = pytest.mark.slow

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "circular", "reflect", "replicate")

# (shape, split dimension, arguments of the convolution)
CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    **{f"1d {mode}": ((2, 1, 23), 2, {"kernel_size": 5, "padding": 2, "padding_mode": mode}) for mode in MODES},
    **{f"2d {mode}": ((1, 1, 17, 12), 2, {"kernel_size": 3, "padding": 1, "padding_mode": mode}) for mode in MODES},
    **{f"2d last {mode}": ((1, 1, 6, 17), 3, {"kernel_size": 5, "padding": 2, "padding_mode": mode}) for mode in MODES},
    **{f"3d {mode}": ((1, 1, 10, 6, 5), 2, {"kernel_size": 3, "padding": 1, "padding_mode": mode}) for mode in MODES},
    **{
        f"stride {mode}": ((1, 1, 23, 9), 2, {"kernel_size": 5, "padding": 2, "stride": 2, "padding_mode": mode})
        for mode in MODES
    },
    **{
        f"dilated {mode}": ((1, 1, 26), 2, {"kernel_size": 3, "padding": 4, "dilation": 4, "padding_mode": mode})
        for mode in MODES
    },
    **{  # shards of 2 or 3 rows, halos of 4: from the next neighbour but one
        f"wide halo {mode}": ((1, 1, 11), 2, {"kernel_size": 9, "padding": 4, "padding_mode": mode}) for mode in MODES
    },
    "no padding": ((1, 1, 22, 7), 2, {"kernel_size": 4}),
    "same": ((1, 1, 21), 2, {"kernel_size": 5, "padding": "same"}),
    "same reflect, even": ((1, 1, 21), 2, {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}),
    "padding without a kernel to match": ((1, 1, 20), 2, {"kernel_size": 3, "padding": 4}),
    "kernel of 1": ((1, 1, 16, 4), 2, {"kernel_size": 1}),
    "stride without overlap": ((1, 1, 24), 2, {"kernel_size": 2, "stride": 3}),
    "stride 4, divides": ((1, 1, 32), 2, {"kernel_size": 4, "stride": 4}),
    "groups": ((2, 4, 15, 5), 2, {"out_channels": 6, "groups": 2, "kernel_size": 3, "padding": 1}),
    "channels": ((1, 3, 16, 5), 2, {"out_channels": 2, "kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "no batch dimension": ((1, 18, 6), 1, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "batch": ((5, 1, 8), 0, {"kernel_size": 3, "padding": 1}),
}


def module_of(shape: tuple[int, ...], arguments: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    options = {"out_channels": 1, **arguments}
    dims = 2 if shape == (1, 18, 6) else len(shape) - 2
    channels = shape[0] if shape == (1, 18, 6) else shape[1]
    return alike(CONVOLUTIONS[dims](channels, options.pop("out_channels"), **options, bias=False, dtype=dtype))


def equals_single(size: int, name: str, dtype: torch.dtype, engines: tuple[str, ...]) -> None:
    shape, dim, arguments = CASES[name]
    module = module_of(shape, arguments, dtype)
    space = distributed.space(shape, mesh_of(size), [Shard(dim)], dtype=dtype)
    single = al.linear_operator(module, al.TensorSpec(shape, dtype), engine="eager")
    for engine in engines:
        A = distributed.convolution(module, space, engine=engine)
        assert A.engine == ("traced" if engine == "auto" else engine), A.explain()
        assert_equals_single(A, single)
    if size == 3:
        assert al.check_adjoint(A, trials=1).passed


# On four processes only where halos come from further than the next.
FITTING = [(name, size) for name in CASES for size in (2, 3, 4) if size < 4 or name.startswith("wide")]


@pytest.mark.parametrize(("name", "size"), FITTING)
def test_equals_the_convolution_of_the_whole(groups: Callable[[int], Group], name: str, size: int) -> None:
    groups(size).run(equals_single, size, name, torch.float64, ("eager",) if size == 2 else ("auto",))


@pytest.mark.parametrize("name", ["2d circular", "stride reflect", "wide halo circular", "groups"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.float32], ids=str)
def test_dtypes(groups: Callable[[int], Group], name: str, dtype: torch.dtype) -> None:
    groups(2).run(equals_single, 2, name, dtype, ("eager", "auto"))


def on_two_mesh_dimensions(mode: str, stride: int, engine: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("y", "x"))
    module = nn.Conv2d(1, 1, (5, 3), padding=(2, 1), stride=stride, padding_mode=mode, bias=False, dtype=torch.float64)
    alike(module)
    shape = (1, 1, 11, 9)
    single = al.linear_operator(module, al.TensorSpec(shape, torch.float64), engine="eager")
    for placements in ([Shard(2), Shard(3)], [Shard(3), Shard(2)], [Replicate(), Shard(3)], [Shard(2), Replicate()]):
        space = distributed.space(shape, mesh, placements, dtype=torch.float64)
        A = distributed.convolution(module, space, engine=engine)
        assert_equals_single(A, single)


@pytest.mark.parametrize(("stride", "engine"), [(1, "eager"), (2, "auto")])
@pytest.mark.parametrize("mode", MODES)
def test_two_split_dimensions_on_a_mesh_of_two(groups: Any, mode: str, stride: int, engine: str) -> None:
    groups(4).run(on_two_mesh_dimensions, mode, stride, engine)


def gradients_and_second_adjoints(size: int) -> None:
    shape, mesh = (1, 1, 19), mesh_of(size)
    module = module_of(shape, {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}, torch.float64)
    space = distributed.space(shape, mesh, [Shard(2)], dtype=torch.float64)
    whole = al.linear_operator(module, al.TensorSpec(shape, torch.float64))
    x, y = whole.domain.randn(seeded(1)), whole.codomain.randn(seeded(2))
    for engine in ENGINES:
        A = distributed.convolution(module, space, engine=engine)
        v = distributed.shard(y, A.codomain).requires_grad_()
        # The adjoint of the adjoint, by differentiating it.
        found = torch.autograd.grad(A.H(v), v, distributed.shard(x, space))[0]
        torch.testing.assert_close(distributed.gather(found, A.codomain), whole(x), rtol=1e-13, atol=1e-13)
        # The gradient in the kernel, which is one for all processes, through A, through Aᴴ and through both.
        local_x, local_y = distributed.shard(x, space), distributed.shard(y, A.codomain)
        F, G = al.LeastSquares(A, local_y), al.LeastSquares(whole, y)
        for ours, theirs in (
            (F(local_x), G(x)),
            (space.inner(local_x, A.H(local_y)), whole.domain.inner(x, whole.H(y))),
            (space.norm(F.gradient(local_x)), whole.domain.norm(G.gradient(x))),
        ):
            gradient, expected = (torch.autograd.grad(value, module.weight)[0] for value in (ours, theirs))
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
        z = distributed.shard(x, space).requires_grad_()
        (gradient,) = torch.autograd.grad(F(z), z, create_graph=True)
        torch.testing.assert_close(gradient, F.gradient(z), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(distributed.gather(gradient.detach(), space), G.gradient(x), rtol=1e-12, atol=1e-12)
        (hessian,) = torch.autograd.grad(gradient, z, torch.ones_like(z))
        torch.testing.assert_close(hessian, F.hessian(torch.ones_like(z)), rtol=1e-12, atol=1e-12)


def test_derivatives_of_derivatives(group: Group) -> None:
    group.run(gradients_and_second_adjoints, group.size)


def gradients_beside_a_slow_process(size: int) -> None:
    rank, shape = torch.distributed.get_rank(), (1, 1, 12, 8, 8)
    options = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}
    module, busy = module_of(shape, options, torch.float32), threading.Event()
    space = distributed.space(shape, mesh_of(size), [Shard(2)], dtype=torch.float32)
    pause = random.Random(rank)

    def disturb() -> None:
        numbers = torch.randn(64, 64)
        while not busy.is_set():
            numbers = torch.tanh(numbers @ numbers)
            time.sleep(pause.random() / 500)

    threads = [threading.Thread(target=disturb) for _ in range(2 * rank)]
    for thread in threads:
        thread.start()
    try:
        A = distributed.convolution(module, space)
        single = al.linear_operator(module, al.TensorSpec(shape, torch.float32))
        x, y = single.domain.randn(seeded(1)), single.codomain.randn(seeded(2))
        F = al.LeastSquares(A, distributed.shard(y, A.codomain))
        G = al.LeastSquares(single, y)
        z = distributed.shard(x, space)
        for step in range(200):
            gradient = F.gradient(z)
            if step % 20 == 0:
                assert_close(distributed.gather(gradient, space), G.gradient(distributed.gather(z, space)))
            z = z - 1e-3 * gradient
        assert_same_everywhere(space.norm(z), mesh_of(size))
    finally:
        busy.set()
        for thread in threads:
            thread.join()


def test_a_slow_process_changes_no_number_of_messages(groups: Callable[[int], Group]) -> None:
    groups(2).run(gradients_beside_a_slow_process, 2)


def refusals(size: int) -> None:
    mesh = mesh_of(size)

    def refused(match: str, module: nn.Module, space: Any) -> None:
        with pytest.raises(al.SpaceMismatchError, match=match):
            distributed.convolution(alike(module), space)

    space = distributed.space((1, 2, 16), mesh, [Shard(2)])
    refused("without bias", nn.Conv1d(2, 1, 3), space)
    refused("expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got ConvTranspose1d", nn.ConvTranspose1d(2, 1, 3), space)
    refused("channels in one piece", nn.Conv1d(12, 1, 3, bias=False), distributed.space((1, 12, 16), mesh, [Shard(1)]))
    refused("outputs for every process", nn.Conv1d(2, 1, 3, stride=16, bias=False), space)
    refused("expected a kernel that fits", nn.Conv1d(2, 1, 17, bias=False), space)
    refused("reflect padding of less than", nn.Conv1d(2, 1, 3, padding=16, padding_mode="reflect", bias=False), space)
    if size > 2:
        refused("only padding", nn.Conv1d(2, 1, 1, padding=100, bias=False), space)
    refused(
        "an array of 3 or 4 dimensions", nn.Conv2d(2, 1, 3, bias=False), distributed.space((16, 16), mesh, [Shard(1)])
    )
    refused("a sharded space of one array", nn.Conv1d(2, 1, 3, bias=False), al.Space.of((1, 2, 16)))
    refused("a sharded space of one array", nn.Conv1d(2, 1, 3, bias=False), distributed.direct_sum((1, 2, 16), mesh))
    rank = torch.distributed.get_rank()
    other = alike(nn.Conv1d(2, 1, 3, bias=False))
    other.weight.data[0, 0, 0] += rank  # of another seed on each process, say: no convolution of the whole
    for module in (other, nn.Conv1d(2, 1, 3, padding=rank, bias=False)):
        with pytest.raises(al.SpaceMismatchError, match="the same convolution on all processes"):
            distributed.convolution(module, space)


def test_what_is_not_supported_is_refused_by_name(group: Group) -> None:
    group.run(refusals, group.size)
