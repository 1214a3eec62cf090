"""Lowered convolutions: equal to the plain ones, and off when asked."""

import pytest
import torch
from torch import nn

import adjointlab as al
from adjointlab.transpose import kernels

CASES = [
    (nn.Conv1d, (1, 1, 200), {"kernel_size": 31, "padding": 15}),
    (nn.Conv2d, (1, 1, 48, 48), {"kernel_size": 11, "padding": 5, "padding_mode": "circular"}),
    (nn.Conv2d, (1, 1, 48, 48), {"kernel_size": 9, "padding": 4, "padding_mode": "reflect", "stride": 2}),
    (nn.Conv2d, (2, 1, 33, 40), {"kernel_size": (8, 9), "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv3d, (1, 1, 16, 16, 16), {"kernel_size": 7, "padding": 3}),
    (nn.ConvTranspose2d, (1, 1, 20, 20), {"kernel_size": 9, "stride": 2, "padding": 3, "output_padding": 1}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("forced", ["fft", "tapped", "flipped"])
@pytest.mark.parametrize(("layer", "shape", "settings"), CASES)
def test_forced_kernels_equal_plain(
    monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], shape: tuple[int, ...], settings: dict, forced: str
) -> None:
    def choose(site: kernels.Site, **options: bool) -> str:
        return forced if forced in kernels.available(site) else "native"

    monkeypatch.setattr(kernels, "choose", choose)
    module = layer(shape[1], 1, bias=False, dtype=torch.float64, **settings).requires_grad_(False)
    plain = al.linear_operator(module, shape, lowering=False)
    lowered = al.linear_operator(module, shape)
    generator = torch.Generator().manual_seed(0)
    x, v = plain.domain.randn(generator), plain.codomain.randn(generator)
    assert lowered.engine == "traced"
    for a, b in ((plain(x), lowered(x)), (plain.H(v), lowered.H(v))):
        assert float((a - b).norm()) <= 32 * torch.finfo(torch.float64).eps * float(a.norm())


def test_lowering_can_be_turned_off() -> None:
    module = nn.Conv2d(1, 1, 31, padding=15, bias=False)
    assert "fft" in al.linear_operator(module, (1, 1, 256, 256), check=True).explain()
    text = al.linear_operator(module, (1, 1, 256, 256), lowering=False).explain()
    assert "fft" not in text
    assert "convolution_backward" in text


@pytest.mark.parametrize("change", ["in place", "data", "assignment", "numpy", "load_state_dict"])
def test_a_changed_kernel_is_seen(change: str) -> None:
    module = nn.Conv2d(1, 1, 15, padding=7, bias=False)
    operator = al.linear_operator(module, (1, 1, 128, 128))
    assert "fft" in operator.explain()
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
