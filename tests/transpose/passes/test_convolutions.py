"""Lowered convolutions: equal to the plain ones, and off when asked."""

import pytest
import torch
from test_trace import ops_of
from torch import nn

import adjointlab as al
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.kernels.convolution import Site

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
    monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], shape: tuple[int, ...], settings: dict, forced: str
) -> None:
    dtype = torch.float32 if forced == "polyphase" else torch.float64

    def choose(site: Site, **options: bool) -> str:
        return forced if forced in kernels.available(site) else "native"

    monkeypatch.setattr(choice, "choose", choose)
    module = layer(shape[1], 1, bias=False, dtype=dtype, **settings).requires_grad_(False)
    plain = al.linear_operator(module, shape, lowering=False)
    lowered = al.linear_operator(module, shape)
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
def test_circular_padding_is_left_to_the_transform(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], settings: dict, size: str
) -> None:
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    module = layer(shape[1], shape[1], padding_mode="circular", bias=False, dtype=torch.float64, **settings)
    module.requires_grad_(False)
    eager, lowered = (al.linear_operator(module, shape, engine=engine) for engine in ("eager", "auto"))
    generator = torch.Generator().manual_seed(0)
    x, v = eager.domain.randn(generator), eager.codomain.randn(generator)
    for a, b in ((eager(x), lowered(x)), (eager.H(v), lowered.H(v))):
        assert float((a - b).norm()) <= 32 * torch.finfo(torch.float64).eps * float(a.norm())
    assert lowered.explain().count(f"fft of size {size},") == 2
    assert ("accumulate" in lowered.explain()) is (size == "60×60")


@pytest.mark.parametrize("almost", ["reversed", "scaled", "one side", "replicated"])
def test_what_only_resembles_circular_padding_is_not_taken_for_it(almost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))
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
    eager, lowered = (al.linear_operator(forward, domain, engine=engine) for engine in ("eager", "auto"))
    v = eager.codomain.randn(torch.Generator().manual_seed(0))
    assert "fft of size 70" in lowered.explain()
    assert float((eager.H(v) - lowered.H(v)).norm()) <= 32 * torch.finfo(torch.float64).eps * float(v.norm())


def test_lowering_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))
    module = nn.Conv2d(1, 1, 31, padding=15, bias=False)
    assert "fft" in al.linear_operator(module, (1, 1, 256, 256), check=True).explain()
    text = al.linear_operator(module, (1, 1, 256, 256), lowering=False).explain()
    assert "fft" not in text
    assert "convolution_backward" in text


@pytest.mark.parametrize("kernel", ["fft", PHASES, "tapped"])
@pytest.mark.parametrize("change", ["in place", "data", "assignment", NUMPY, "load_state_dict"])
def test_a_changed_kernel_is_seen(change: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *_, **__: kernel)
    module = nn.Conv2d(1, 1, 7, padding=3, bias=False)
    operator = al.linear_operator(module, (1, 1, 32, 32))
    assert kernel in operator.explain()
    v = operator.codomain.randn(torch.Generator().manual_seed(0))
    before = operator.H(v)
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
    assert torch.equal(operator.H(v), 2 * before)


@pytest.mark.cpu
def test_phases_are_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *_, **__: "polyphase")
    module = nn.Conv2d(1, 2, 3, padding=1, bias=False).requires_grad_(requires_grad=False)
    eager, A = (al.linear_operator(module, (1, 1, 8, 9), engine=engine) for engine in ("eager", "compiled"))
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


@pytest.mark.parametrize(("layer", "shape", "settings"), LEARNED, ids=str)
def test_gradients_in_kernels_by_transforms(
    monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], shape: tuple[int, ...], settings: dict
) -> None:
    monkeypatch.setattr(choice, "by_transforms", lambda _: True)
    module = layer(shape[1], **{"bias": False, "dtype": torch.float64, **settings})
    A = al.affine_operator(module, shape) if module.bias is not None else al.linear_operator(module, shape)
    assert A.engine == "traced", A.explain()
    assert "for the gradient in a" in A.explain()
    generator = torch.Generator().manual_seed(0)
    x, v = A.domain.randn(generator).requires_grad_(), A.codomain.randn(generator)
    wanted = (x, *module.parameters())
    found, expected = (torch.autograd.grad(f(x), wanted, v) for f in (A, module))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 32 * A.domain.eps * float(b.norm())
        assert a.is_contiguous()


def test_each_gradient_in_a_chain_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "by_transforms", lambda _: True)
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))
    chain = nn.Sequential(*[nn.Conv2d(1, 1, 9, bias=False, dtype=torch.float64) for _ in range(3)])
    A = al.linear_operator(chain, (1, 1, 40, 40))
    x, v = A.domain.randn(), A.codomain.randn()
    wanted = tuple(chain.parameters())
    for a, b in zip(*(torch.autograd.grad(f(x), wanted, v) for f in (A, chain)), strict=True):
        assert float((a - b).norm()) <= 32 * A.domain.eps * float(b.norm())
    result = A(x)
    assert "aten::convolution_backward" not in ops_of(lambda: torch.autograd.grad(result, wanted, v))


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 3, groups=2, bias=False), nn.ConvTranspose2d(2, 2, 3, bias=False)])
def test_other_gradients_in_kernels_stay_native(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    monkeypatch.setattr(choice, "by_transforms", lambda _: True)
    A = al.linear_operator(module, (1, 2, 20, 20))
    assert A.engine == "traced"
    assert "for the gradient" not in A.explain()
