"""Lowered convolutions: equal to the plain ones, and off when asked."""

import pytest
import torch
from built import affine, operator, ops_of, prefer
from torch import nn

import adjointlab as al
from adjointlab.transpose.kernels.registry import transformed

pytestmark = pytest.mark.slow

PHASES = pytest.param("polyphase", marks=pytest.mark.cpu)  # oneDNN's
NUMPY = pytest.param("numpy", marks=pytest.mark.cpu)
CASES = [
    (nn.Conv1d, (1, 1, 200), {"kernel_size": 31, "padding": 15}),
    (nn.Conv2d, (1, 1, 48, 48), {"kernel_size": 11, "padding": 5, "padding_mode": "circular"}),
    (nn.Conv2d, (1, 1, 48, 48), {"kernel_size": 9, "padding": 4, "padding_mode": "reflect", "stride": 2}),
    (nn.Conv2d, (2, 1, 33, 40), {"kernel_size": (8, 9), "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv3d, (1, 1, 16, 16, 16), {"kernel_size": 7, "padding": 3}),
    (nn.ConvTranspose2d, (1, 1, 20, 20), {"kernel_size": 9, "stride": 2, "padding": 3, "output_padding": 1}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("forced", ["fft", "tapped", "flipped", PHASES])
@pytest.mark.parametrize(("layer", "shape", "settings"), CASES)
def test_forced_kernels_equal_plain(
    layer: type[nn.Module], shape: tuple[int, ...], settings: dict, forced: str
) -> None:
    dtype = torch.float32 if forced == "polyphase" else torch.float64
    module = layer(shape[1], 1, bias=False, dtype=dtype, **settings).requires_grad_(False)
    plain = al.linear_operator(module, shape, engine="eager")
    lowered = operator(module, shape, prefer(forced))
    generator = torch.Generator().manual_seed(0)
    x, v = plain.domain.randn(generator), plain.codomain.randn(generator)
    assert lowered.engine == "traced"
    if "stride" not in settings or forced == "polyphase":
        assert forced in lowered.explain()
    for a, b in ((plain(x), lowered(x)), (plain.H(v), lowered.H(v))):
        assert float((a - b).norm()) <= 32 * torch.finfo(dtype).eps * float(a.norm())


CYCLIC = [
    ((1, 1, 128), {"kernel_size": 31, "padding": 15}, "128"),
    ((1, 1, 48, 50), {"kernel_size": 11, "padding": 5}, "48×50"),
    ((2, 3, 48, 50), {"kernel_size": (7, 5), "padding": (3, 2), "stride": 2}, "48×50"),
    ((2, 4, 48, 50), {"kernel_size": 5, "padding": 4, "dilation": 2, "groups": 2}, "48×50"),
    ((1, 1, 16, 18, 20), {"kernel_size": 5, "padding": 2}, "16×18×20"),
    ((1, 1, 47, 50), {"kernel_size": 11, "padding": 5}, "60×60"),  # 47 is prime, and no length for a transform
    ((1, 1, 48, 50), {"kernel_size": 10, "padding": 5}, "60×60"),  # 49 rows in the result, of 48 different ones
]


@pytest.mark.parametrize(("shape", "settings", "size"), CYCLIC, ids=str)
def test_circular_padding_is_left_to_the_transform(shape: tuple[int, ...], settings: dict, size: str) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    module = layer(shape[1], shape[1], padding_mode="circular", bias=False, dtype=torch.float64, **settings)
    module.requires_grad_(False)
    asked = []
    eager = al.linear_operator(module, shape, engine="eager")
    lowered = operator(module, shape, lambda spec: asked.append(spec) or transformed(spec))
    assert {"×".join(map(str, spec.fft_size)) for spec in asked} == {size}  # a kernel is chosen by the time of these
    generator = torch.Generator().manual_seed(0)
    x, v = eager.domain.randn(generator), eager.codomain.randn(generator)
    for a, b in ((eager(x), lowered(x)), (eager.H(v), lowered.H(v))):
        assert float((a - b).norm()) <= 32 * torch.finfo(torch.float64).eps * float(a.norm())
    assert lowered.explain().count(f"fft of size {size},") == 2
    assert ("accumulate" in lowered.explain()) is (size == "60×60")


@pytest.mark.parametrize("almost", ["reversed", "scaled", "one side", "replicated"])
def test_what_only_resembles_circular_padding_is_not_taken_for_it(almost: str) -> None:
    conv = nn.Conv1d(1, 1, 9, bias=False, dtype=torch.float64).requires_grad_(False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        left, right = x[..., -4:], x[..., :4]
        if almost == "reversed":
            left, right = right, left
        elif almost == "scaled":
            left = -left
        elif almost == "one side":
            right = torch.zeros_like(right)
        else:
            left, right = x[..., :1].expand_as(left), x[..., -1:].expand_as(right)
        return conv(torch.cat([left, x, right], -1))

    domain = al.TensorSpec((1, 1, 60), torch.float64)
    eager, lowered = al.linear_operator(forward, domain, engine="eager"), operator(forward, domain, transformed)
    v = eager.codomain.randn(torch.Generator().manual_seed(0))
    assert "fft of size 70" in lowered.explain()
    assert float((eager.H(v) - lowered.H(v)).norm()) <= 32 * torch.finfo(torch.float64).eps * float(v.norm())


def test_lowering_can_be_turned_off() -> None:
    module = nn.Conv2d(1, 1, 31, padding=15, bias=False)
    assert "fft" in operator(module, (1, 1, 256, 256), transformed).explain()
    text = operator(module, (1, 1, 256, 256), transformed, lowering=False).explain()
    assert "fft" not in text
    assert "convolution_backward" in text


@pytest.mark.parametrize("kernel", ["fft", PHASES, "tapped"])
@pytest.mark.parametrize("change", ["in place", "data", "assignment", NUMPY, "load_state_dict"])
def test_a_changed_kernel_is_seen(change: str, kernel: str) -> None:
    module = nn.Conv2d(1, 1, 7, padding=3, bias=False)
    A = operator(module, (1, 1, 32, 32), prefer(kernel))
    assert kernel in A.explain()
    v = A.codomain.randn(torch.Generator().manual_seed(0))
    before = A.H(v)
    with torch.no_grad():
        if change == "in place":
            module.weight.mul_(2)
        elif change == "data":
            module.weight.data.mul_(2)
        elif change == "assignment":
            module.weight = nn.Parameter(2 * module.weight)
        elif change == "numpy":
            module.weight.detach().numpy()[:] *= 2
        else:
            module.load_state_dict({"weight": 2 * module.weight})
    assert torch.equal(A.H(v), 2 * before)


@pytest.mark.cpu
def test_phases_are_compiled_too() -> None:
    module = nn.Conv2d(1, 2, 3, padding=1, bias=False).requires_grad_(requires_grad=False)
    eager = al.linear_operator(module, (1, 1, 8, 9), engine="eager")
    A = operator(module, (1, 1, 8, 9), prefer("polyphase"), requested="compiled")
    assert A.engine == "compiled", A.explain()
    generator = torch.Generator().manual_seed(0)
    x, v = A.domain.randn(generator), A.codomain.randn(generator)
    for a, b in ((eager(x), A(x)), (eager.H(v), A.H(v))):
        assert float((a - b).norm()) <= 8 * A.domain.eps * float(a.norm())


LEARNED = [
    (nn.Conv1d, (3, 2, 50), {"out_channels": 3, "kernel_size": 7, "padding": 2, "stride": 3}),
    (nn.Conv2d, (2, 1, 20, 23), {"out_channels": 1, "kernel_size": (5, 4), "dilation": (2, 3), "padding": 4}),
    (nn.Conv2d, (1, 3, 20, 23), {"out_channels": 2, "kernel_size": 3, "padding_mode": "circular", "padding": 1}),
    (nn.Conv3d, (2, 1, 9, 8, 10), {"out_channels": 2, "kernel_size": 3, "stride": 2, "bias": True}),
]


def always(_: object) -> bool:
    return True


@pytest.mark.parametrize(("layer", "shape", "settings"), LEARNED, ids=str)
def test_gradients_in_kernels_by_transforms(layer: type[nn.Module], shape: tuple[int, ...], settings: dict) -> None:
    module = layer(shape[1], **{"bias": False, "dtype": torch.float64, **settings})
    A = (affine if module.bias is not None else operator)(module, shape, None, transform=always)
    assert A.engine == "traced", A.explain()
    generator = torch.Generator().manual_seed(0)
    x, v = A.domain.randn(generator).requires_grad_(), A.codomain.randn(generator)
    wanted = (x, *module.parameters())
    found, expected = (torch.autograd.grad(f(x), wanted, v) for f in (A, module))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 32 * A.domain.eps * float(b.norm())
        assert a.is_contiguous()
    result = A(x)  # the gradient in the bias is a sum
    assert "aten::convolution_backward" not in ops_of(lambda: torch.autograd.grad(result, wanted[1:], v))


def test_each_gradient_in_a_chain_has_its_kernel() -> None:
    chain = nn.Sequential(*[nn.Conv2d(1, 1, 9, bias=False, dtype=torch.float64) for _ in range(3)])
    A = operator(chain, (1, 1, 40, 40), transformed, transform=always)
    x, v = A.domain.randn(), A.codomain.randn()
    wanted = tuple(chain.parameters())
    for a, b in zip(*(torch.autograd.grad(f(x), wanted, v) for f in (A, chain)), strict=True):
        assert float((a - b).norm()) <= 32 * A.domain.eps * float(b.norm())
    result = A(x)
    assert "aten::convolution_backward" not in ops_of(lambda: torch.autograd.grad(result, wanted, v))


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 3, groups=2, bias=False), nn.ConvTranspose2d(2, 2, 3, bias=False)])
def test_other_gradients_in_kernels_stay_native(module: nn.Module) -> None:
    A = operator(module, (1, 2, 20, 20), None, transform=always)
    assert A.engine == "traced"
    x, v = A.domain.randn(), A.codomain.randn()
    result = A(x)
    assert "aten::convolution_backward" in ops_of(lambda: torch.autograd.grad(result, module.weight, v))


@pytest.mark.parametrize("shape", [(1, 1, 40, 40), (2, 1, 9, 12, 11)])
def test_a_layer_with_a_bias_has_the_programs_of_one_without(shape: tuple[int, ...]) -> None:
    layer = {4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](1, 1, 7, padding=3)
    biased = affine(layer, shape, prefer("fft"))
    without = type(layer)(1, 1, 7, padding=3, bias=False)
    without.weight = layer.weight
    plain = operator(without, shape, prefer("fft"))
    programs = [A.explain().split("adjoint program")[1] for A in (biased, plain)]
    assert programs[0] == programs[1]
    x, v = plain.domain.randn(), plain.codomain.randn()
    assert torch.equal(biased.linear(x), plain(x))
    assert ops_of(biased.linear, x) == ops_of(plain, x)
    results = biased.H(v), plain.H(v)
    gradients = [torch.autograd.grad(r, layer.weight, x, retain_graph=True)[0] for r in results]
    assert torch.equal(*gradients)
    work = [
        [name for name in ops_of(torch.autograd.grad, r, layer.weight, x, True) if "fft" in name or "conv" in name]
        for r in results
    ]
    assert work[0] == work[1]
    assert work[0]
