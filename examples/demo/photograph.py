"""A real photograph, blurred and reduced by ``y = k ⊛ x`` at every second pixel, with noise; recovered from y."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skimage import data as images
from torch import Tensor, nn

import adjointlab as al

from .common import Recovery, Stage, blur, drawn, recover, show

_NOISE = 0.003
_SIGMA = 1.6


def deblur_photograph(stage: Stage) -> Recovery:
    """Recover a photograph from ``y = c x + noise`` by ``x ← x − cᴴ(c x − y)/‖c‖²``.

    Parameters
    ----------
    stage : Stage
        Where to print and draw.

    Returns
    -------
    Recovery
        The result and its numbers.
    """
    stage.title("2  A photograph: reflect-padded 9×9 blur with stride 2, and noise")
    image = images.camera()  # type: ignore[no-untyped-call]
    truth = torch.from_numpy(image.astype("float32") / 255)[None, None]
    if stage.quick:
        truth = truth[..., 80:208, 160:288].contiguous()
    generator = torch.Generator().manual_seed(1)
    A = al.linear_operator(blur(nn.Conv2d, _SIGMA, _SIGMA, stride=2, padding_mode="reflect"), truth)
    data = A(truth)
    data = data + _NOISE * torch.randn(data.shape, generator=generator)
    recovery = recover(
        stage, "photograph, Conv2d", A, truth=truth, data=data, start=enlarge(data), steps=15 if stage.quick else 60
    )
    _draw(stage, recovery)
    return recovery


def enlarge(y: Tensor) -> Tensor:
    """Return y with linear interpolation between its samples: sample i of y belongs to pixel 2i.

    Parameters
    ----------
    y : Tensor
        Images, in the last two dimensions.

    Returns
    -------
    Tensor
        Twice as many rows and columns.
    """
    n, m = y.shape[2:]
    padded = F.pad(y, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(padded, (2 * n + 1, 2 * m + 1), mode="bilinear", align_corners=True)[
        ..., :-1, :-1
    ].contiguous()


def _draw(stage: Stage, r: Recovery) -> None:
    """Draw the photograph, the data and the result, a detail of each, and the objective."""
    height, width = r.truth.shape[2:]
    titles = (
        f"photograph, {height} × {width}",
        f"data y, {r.data.shape[2]} × {r.data.shape[3]}",
        f"result after {len(r.objective) - 1} steps",
    )
    details = ("detail", f"detail: x₀, error {r.error_before:.1%}", f"detail: error {r.error_after:.1%}")
    with drawn(stage, "photograph.png", 5.2, r) as panels:
        for whole, part, image, close, title, detail in zip(
            "abc", "def", (r.truth, r.data, r.result), (r.truth, r.start, r.result), titles, details, strict=True
        ):
            show(panels[whole], image[0, 0], title, vmin=0, vmax=1)
            show(panels[part], _detail(close), detail, vmin=0, vmax=1)


def _detail(image: Tensor) -> Tensor:
    """Return the part with the camera, in proportion to the size of the image."""
    height, width = image.shape[2:]
    return image[0, 0, height // 8 : height * 3 // 8, width * 3 // 8 : width * 5 // 8]
