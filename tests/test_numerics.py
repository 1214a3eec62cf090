"""What is compared is compared in full precision, whatever torch's settings allow, and these are left as they were."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adjointlab as al
from adjointlab.numerics import full_precision, same

BACKENDS: Any = torch.backends
HAS_NEWER = hasattr(BACKENDS.cudnn, "conv")  # since torch 2.9
PARTS = (
    BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.matmul,
) if HAS_NEWER else ()  # fmt: skip


def newer() -> list[str]:
    return [setting.fp32_precision for setting in PARTS]


def older() -> list[Any]:
    read: list[Any] = []
    for setting in (lambda: BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            read.append(setting())
        except RuntimeError:
            read.append("mixed")
    return read


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave torch's settings as they are for other tests."""
    before, convolutions = newer(), BACKENDS.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = convolutions
    if HAS_NEWER:
        BACKENDS.fp32_precision = "none"
    for setting, value in zip(PARTS, before, strict=True):
        setting.fp32_precision = value


def set_by_hand(setting: Any, value: str) -> Callable[[], None]:
    return lambda: setattr(setting, "fp32_precision", value)


SETTINGS = {
    "default": lambda: None,
    "older, convolutions": lambda: setattr(BACKENDS.cudnn, "allow_tf32", True),
    "older, products": lambda: torch.set_float32_matmul_precision("high"),
    "older, products in bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
}
if HAS_NEWER:
    SETTINGS |= {
        "newer, convolutions": set_by_hand(BACKENDS.cudnn.conv, "tf32"),
        "newer, exact convolutions": set_by_hand(BACKENDS.cudnn.conv, "ieee"),
        "newer, products": set_by_hand(BACKENDS.cuda.matmul, "tf32"),
        "newer, all": set_by_hand(BACKENDS, "tf32"),
    }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_settings_are_left_as_they_were(name: str, raises: bool) -> None:
    SETTINGS[name]()
    before = newer(), older()
    with pytest.raises(KeyError, match="inside") if raises else contextlib.nullcontext(), full_precision:
        assert set(newer()) <= {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        if raises:
            raise KeyError("inside")
    assert (newer(), older()) == before


def test_settings_come_back_when_the_last_block_is_left() -> None:
    """Blocks of several threads overlap in any order."""
    BACKENDS.cudnn.allow_tf32 = True
    before = newer(), older()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with full_precision:
        thread.start()
        entered.wait()
    assert set(newer()) <= {"ieee"}
    assert not BACKENDS.cudnn.allow_tf32
    leave.set()
    thread.join()
    assert (newer(), older()) == before


def coarse(w: Tensor, x: Tensor) -> Tensor:
    """Return ``w ⊙ x`` as a device computes it whose products have the eight bits of bfloat16 unless told otherwise."""
    exact = BACKENDS.cudnn.conv.fp32_precision == "ieee" if HAS_NEWER else not BACKENDS.cudnn.allow_tf32
    return w * x if exact else (w.bfloat16() * x.bfloat16()).float()


def test_a_coarse_device_is_no_reason_to_doubt_an_adjoint() -> None:
    """Of two ways to compute the same with eleven bits, neither is wrong; a wrong one is found all the same."""
    BACKENDS.cudnn.allow_tf32 = True
    w = torch.randn(40)
    assert not torch.equal(coarse(w, w), w * w)
    assert al.check_linearity(lambda x: coarse(w, x), (40,)).verdict != "refuted"
    report = al.check_adjoint(lambda x: coarse(w, x), lambda v: w * v, domain=(40,))
    assert report.passed, str(report)
    assert not al.check_adjoint(lambda x: coarse(w, x), lambda v: 1.001 * w * v, domain=(40,)).passed
    assert BACKENDS.cudnn.allow_tf32


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(1, 1, 11, bias=False)], ids=str)
def test_the_engine_is_derived_under_coarse_settings(layer: nn.Conv2d) -> None:
    """On CUDA kernels round to TF32 here, each in its own way; elsewhere this says that nothing is broken."""
    BACKENDS.cudnn.allow_tf32 = True
    A = al.linear_operator(layer, (1, layer.in_channels, 64, 64))
    assert A.engine == "traced", A.explain()
    assert al.check_adjoint(A).passed


@pytest.mark.parametrize("index", [(0, 0), (3, 40), (7, -1)])
def test_rows_of_a_large_tensor_are_compared_entry_by_entry(index: tuple[int, int]) -> None:
    whole = torch.rand(16, 1 << 14)
    rows, copy = whole[::2], whole[::2].clone()
    assert same(rows, copy)
    rows[index] += 1
    assert not same(rows, copy)
    copy[index] = rows[index] = torch.nan
    assert same(rows, copy)
