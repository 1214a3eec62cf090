# %% [markdown]
# # Somebody else's code: kornia, wrapped as it is
#
# [kornia](https://kornia.org) has hundreds of differentiable image operations. It says of none of them that it is
# linear, and offers an adjoint for none. Wrap them as they are: the linear ones are recognised, and the others
# refused with a reason.

# %%
import kornia
import matplotlib.pyplot as plt
import torch
from skimage import data
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
_ = torch.manual_seed(0)


def show(axes, image, title, **options):
    picture = axes.imshow(image, **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


print("kornia", kornia.__version__)

# %% [markdown]
# ## Which are linear?

# %%
angle = torch.tensor([20.0])
shift = torch.tensor([[0.4, -0.3]])
OPERATIONS = {
    "filters.GaussianBlur2d": kornia.filters.GaussianBlur2d((7, 7), (1.5, 1.5)),
    "filters.BoxBlur": kornia.filters.BoxBlur((5, 5)),
    "filters.Laplacian": kornia.filters.Laplacian(3),
    "filters.SpatialGradient": kornia.filters.SpatialGradient(),
    "geometry.rotate": lambda x: kornia.geometry.rotate(x, angle),
    "geometry.translate": lambda x: kornia.geometry.translate(x, shift),
    "geometry.pyrdown": kornia.geometry.pyrdown,
    "color.rgb_to_yuv": kornia.color.rgb_to_yuv,
    "color.rgb_to_grayscale": kornia.color.rgb_to_grayscale,
    "color.rgb_to_ycbcr": kornia.color.rgb_to_ycbcr,
    "filters.Sobel (magnitude)": kornia.filters.Sobel(),
    "filters.MedianBlur": kornia.filters.MedianBlur((3, 3)),
    "color.rgb_to_hsv": kornia.color.rgb_to_hsv,
    "enhance.sharpness": lambda x: kornia.enhance.sharpness(x, 0.5),
}
reports = {name: al.check_linearity(f, (1, 3, 24, 24)) for name, f in OPERATIONS.items()}
for name, report in reports.items():
    verdict = "affine" if report.is_affine and report.verdict == "refuted" else report.verdict
    why = f"not {report.counterexample.law.rstrip(',')}" if report.counterexample else report.evidence[0]
    print(f"{name:28s} {verdict:9s}  {why[:80]}")

# %% [markdown]
# `Laplacian` looks at a value of the image while it runs; no program can stand for that, so the evidence is numerical.
# `rgb_to_ycbcr` adds an offset to the colour differences; as an affine operator it has a linear part. The magnitude
# of a gradient and a median are not linear, and are refuted.
#
# ## An inverse problem out of foreign parts
#
# A camera that is rotated, blurred and read out at half the resolution: three kornia calls, one operator, no adjoint
# written.

# %%


class Camera(nn.Module):
    """Rotate by a few degrees, blur, and keep every second pixel."""

    def __init__(self, degrees):
        super().__init__()
        self.register_buffer("degrees", torch.tensor([degrees]))
        self.blur = kornia.filters.GaussianBlur2d((9, 9), (1.4, 1.4), border_type="replicate")

    def forward(self, x):
        turned = kornia.geometry.rotate(x, self.degrees, padding_mode="border")
        return self.blur(turned)[..., ::2, ::2]


truth = torch.from_numpy(data.astronaut()[0:192, 130:322] / 255).float().permute(2, 0, 1)[None].contiguous()
shots = [-9.0, -4.0, 0.0, 5.0, 11.0, 16.0]
cameras = [al.linear_operator(Camera(degrees), truth) for degrees in shots]
A = al.vstack(cameras)
al.check_adjoint(A)

# %% [markdown]
# Six shots at half the resolution know more than one. Stacked, they are one operator; the tuple of shots is one
# element of its codomain.

# %% Six shots of a portrait, each rotated; then details of the truth and of three reconstructions
generator = torch.Generator().manual_seed(0)
y = tuple(shot + 0.01 * torch.randn(shot.shape, generator=generator) for shot in A(truth))


def error(x):
    return float((x - truth).norm() / truth.norm())


single = al.solvers.cgls(cameras[2], y[2], damp=0.06, maxiter=30)
joint = al.solvers.cgls(A, y, damp=0.06, maxiter=30)
enlarged = nn.functional.interpolate(y[2], scale_factor=2, mode="bicubic")

fig, panels = plt.subplots(1, 6, figsize=(13.5, 2.7))
for axes, shot, degrees in zip(panels, y, shots, strict=True):
    show(axes, shot[0].permute(1, 2, 0).clamp(0, 1), f"shot at {degrees:g}°, 96 × 96")
plt.show()

fig, panels = plt.subplots(1, 4, figsize=(12.5, 3.6))
window = (slice(None), slice(30, 130), slice(40, 140))
for axes, (name, x) in zip(
    panels,
    {"truth": truth, "one shot, bicubic": enlarged, "one shot, cgls": single.x, "six shots, cgls": joint.x}.items(),
    strict=True,
):
    detail = x[0][window].permute(1, 2, 0).clamp(0, 1)
    show(axes, detail, name if name == "truth" else f"{name}\nerror {error(x):.1%}")
plt.show()

# %% [markdown]
# What was derived for one shot:

# %%
print("\n".join(line[:150] for line in cameras[0].explain().splitlines()[:8]))

# %% [markdown]
# ## What this notebook claims

# %%
linear = list(OPERATIONS)[:9]
for name in linear:
    assert reports[name].verdict in ("proved", "supported"), name
    assert al.check_adjoint(al.linear_operator(OPERATIONS[name], (1, 3, 24, 24))).passed, name
assert sum(reports[name].verdict == "proved" for name in linear) >= 7
assert reports["color.rgb_to_ycbcr"].is_affine
assert reports["color.rgb_to_ycbcr"].verdict == "refuted"
for name in list(OPERATIONS)[10:13]:
    assert reports[name].verdict == "refuted", name
    assert not reports[name].is_affine, name
assert al.check_adjoint(A).passed
assert error(joint.x) < error(single.x)
assert error(joint.x) < error(enlarged)
