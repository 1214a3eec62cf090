"""torchkbnufft computes in TorchScript, which is not to be traced: it once ended the process."""

import math

import pytest
import torch

import adjointlab as al

tkbn = pytest.importorskip("torchkbnufft")


@pytest.mark.parametrize("norm", [None, "ortho"])
def test_the_forward_has_an_adjoint(norm):
    forward, adjoint = tkbn.KbNufft(im_size=(12, 12)), tkbn.KbNufftAdjoint(im_size=(12, 12))
    points = (2 * torch.rand(2, 40) - 1) * math.pi
    operator = al.linear_operator(
        lambda x: forward(x, points, norm=norm), al.TensorSpec((1, 2, 12, 12), torch.complex64)
    )
    assert operator.engine == "eager"
    assert "it calls TorchScript" in operator.explain()
    assert al.check_adjoint(operator).passed
    y = operator.codomain.randn()
    torch.testing.assert_close(operator.H(y), adjoint(y, points, norm=norm))
