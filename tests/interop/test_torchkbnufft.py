"""torchkbnufft computes in TorchScript, which once ended the process: it is traced through."""

import math

import pytest
import torch

import adjointlab as al

tkbn = pytest.importorskip("torchkbnufft")


@pytest.mark.parametrize("norm", [None, "ortho"])
def test_the_adjoint_is_derived_and_is_that_of_the_library(norm):
    forward, adjoint = tkbn.KbNufft(im_size=(12, 12)), tkbn.KbNufftAdjoint(im_size=(12, 12))
    points = (2 * torch.rand(2, 40) - 1) * math.pi
    operator = al.linear_operator(
        lambda x: forward(x, points, norm=norm), al.TensorSpec((1, 2, 12, 12), torch.complex64)
    )
    assert operator.engine == "traced"
    assert "_fft_c2c" in operator.explain()
    assert al.check_adjoint(operator).passed
    y = operator.codomain.randn()
    torch.testing.assert_close(operator.H(y), adjoint(y, points, norm=norm))


def test_points_are_followed():
    forward, points = tkbn.KbNufft(im_size=(12, 12)), (2 * torch.rand(2, 40) - 1) * math.pi
    operator = al.linear_operator(lambda x: forward(x, points), al.TensorSpec((1, 1, 12, 12), torch.complex64))
    x = operator.domain.randn()
    points.copy_((2 * torch.rand(2, 40) - 1) * math.pi)
    torch.testing.assert_close(operator(x), forward(x, points))
