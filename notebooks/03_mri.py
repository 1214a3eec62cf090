# %% [markdown]
# # Complex operators: multi-coil MRI
#
# A scanner measures the Fourier transform of the body, seen through the sensitivities of several coils, and to save
# time only some rows of it, here every fourth and those in the middle: $y = M F S x$. Here $x$ is a real MRI volume
# (the example that ships with nibabel), with a smooth phase as scanners produce; the coils and the sampling are
# simulated.
#
# All is complex. PyTorch's vector-Jacobian product gives the *Hermitian* adjoint $S^H F^H M^H$; nothing has to be
# conjugated by hand.

# %%
from importlib.resources import as_file, files

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import torch
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
torch.manual_seed(0)


def show(axes, image, title, **options):
    picture = axes.imshow(image, **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


def coloured(z):
    """Phase as colour, the square root of the magnitude as brightness."""
    hue = plt.get_cmap("hsv")((z.angle() / (2 * torch.pi) + 0.5).numpy())[..., :3]
    return (0.5 * hue + 0.5) * z.abs().clamp(max=1).sqrt()[..., None].numpy()


with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
    scans = np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj, dtype=np.float32)
volume = torch.from_numpy(np.rot90(scans[..., 0]).transpose(2, 0, 1)[7:15, :, 20:108].copy())
volume = volume / torch.quantile(volume, 0.999)
slices, height, width = volume.shape

v = torch.linspace(-1, 1, height)[:, None]
u = torch.linspace(-1, 1, width)
truth = torch.polar(volume, (0.8 * u * v + 0.5 * v - 0.7 * u**2).expand_as(volume))
print(tuple(truth.shape), truth.dtype)

# %% [markdown]
# ## The forward model
#
# One line of `forward`; coil maps and mask are buffers.

# %%


class MultiCoil(nn.Module):
    """``x ↦ M F S x``: (slices, rows, columns) to (slices, coils, rows, columns)."""

    def __init__(self, maps, mask):
        super().__init__()
        self.register_buffer("maps", maps)
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.mask * torch.fft.fft2(self.maps * x[:, None], norm="ortho")


coils = 8
angles = torch.arange(coils) * 2 * torch.pi / coils
x0, y0 = 1.2 * torch.cos(angles)[:, None, None], 1.2 * torch.sin(angles)[:, None, None]
maps = torch.polar(torch.exp(-((u - x0) ** 2 + (v - y0) ** 2) / 0.9), 1.5 * (u * y0 - v * x0) + angles[:, None, None])
maps = maps / maps.abs().square().sum(0).sqrt()

generator = torch.Generator().manual_seed(3)
frequency = torch.fft.fftfreq(height)
every_fourth = torch.arange(height) % 4 == 0
mask = ((frequency.abs() < 0.03) | every_fourth).float()[:, None]

A = al.linear_operator(MultiCoil(maps, mask), truth, batch_dims=1)
print(A.domain, "→", A.codomain)
print(f"rows measured: {mask.mean():.0%}; complex-linear: {A.is_complex_linear}")

# %% The image as eight coils see it, and the sampled rows
fig, panels = plt.subplots(1, coils + 1, figsize=(12, 1.9))
middle = slices // 2
for k in range(coils):
    show(panels[k], coloured(maps[k] * truth[middle]), f"coil {k + 1}")
show(panels[-1], torch.fft.fftshift(mask).expand(height, width), "sampled rows")
plt.show()

# %% [markdown]
# ## The Hermitian adjoint
#
# Between complex spaces, $\langle a, b\rangle = \sum_i \overline{a_i}\,b_i$, and the dot test compares complex
# numbers, real and imaginary part. The adjoint by hand needs the conjugate of the maps; without it, the phases of
# the coils add up instead of cancelling, and the image is gone.

# %%


def by_hand(y):
    return (maps.conj() * torch.fft.ifft2(mask * y, norm="ortho")).sum(1)


def conjugate_forgotten(y):
    return (maps * torch.fft.ifft2(mask * y, norm="ortho")).sum(1)


z = A.codomain.randn(torch.Generator().manual_seed(5))
print("derived against by hand, relative:", float((A.H(z) - by_hand(z)).norm() / A.H(z).norm()))
al.check_adjoint(A, adjoint=conjugate_forgotten)

# %% [markdown]
# The derived program, for the record: the mask, an inverse transform, conjugated maps, a sum over coils, and no
# forward.

# %%
print(A.explain())

# %% [markdown]
# ## Reconstruction
#
# `A.H(y)` alone is the "zero-filled" image: rows that were not measured count as zeros, and the image folds over
# itself. Least squares uses that each coil sees the folded parts differently. With `batch_dims=1`, each slice is a
# problem of its own to the solver, with its own step lengths and its own end.

# %%
noise = 0.003
y = A(truth)
y = y + noise * mask * torch.randn(y.shape, generator=generator, dtype=y.dtype)


def error(x):
    return float((x - truth).norm() / truth.norm())


zero_filled = A.H(y)
errors = [error(zero_filled)]
solution = al.solvers.cgls(A, y, damp=0.03, maxiter=60, tol=3e-4, callback=lambda x, info: errors.append(error(x)))
forgotten = conjugate_forgotten(y)
print(f"zero-filled {error(zero_filled):.1%}, cgls {error(solution.x):.1%} after {solution.iterations.tolist()} steps")

# %% Four images and their errors, the error of cgls falling with steps, and the data of one coil
fig, panels = plt.subplots(2, 5, figsize=(12, 5.2))


def scale(axes, picture, label):
    """Draw the scale of a picture at its right, without taking room from it."""
    fig.colorbar(picture, cax=axes.inset_axes([1.04, 0, 0.06, 1]), label=label)


images = {
    "truth": truth,
    "no conjugate": forgotten,
    "Aᴴy": zero_filled,
    "cgls": solution.x,
}
for k, (name, x) in enumerate(images.items()):
    label = name if name == "truth" else f"{name}: error {error(x):.0%}"
    show(panels[0, k], x[middle].abs(), label, vmin=0, vmax=1)
    if name == "truth":
        show(panels[1, k], coloured(x[middle]), "phase as colour")
    else:
        difference = show(panels[1, k], (x - truth)[middle].abs(), "|x − truth|", cmap="magma", vmin=0, vmax=0.3)
scale(panels[1, 3], difference, "0.3 and more: yellow")
panels[0, 4].plot(errors, "o-", ms=3)
panels[0, 4].set(title="error of cgls", xlabel="step", ylabel="‖x − truth‖ / ‖truth‖", ylim=(0, None))
panels[0, 4].set_box_aspect(height / width)
samples = torch.fft.fftshift(y[middle, 0].abs()).clamp_min(1e-3).log10()
scale(panels[1, 4], show(panels[1, 4], samples, "data of one coil", cmap="viridis"), "log₁₀ |y|")
plt.show()

# %% [markdown]
# The leading dimension was declared free (`batch_dims=1`), so the same operator takes any number of slices:

# %%
print(A(truth[:3]).shape, A.H(y[:1]).shape)

# %% [markdown]
# ## Pitfall 1: `rfft` is real-linear only
#
# `rfft` takes real $x$ to complex $y$. There $\langle A x, y\rangle$ is complex and $\langle x, A^H y\rangle$ real,
# so they cannot be equal; what exists is the adjoint for $\operatorname{Re}\langle\cdot,\cdot\rangle$. That is what
# `A.H` is, what a least-squares gradient needs, and what the test compares. It is not `irfft`:

# %%
R = al.linear_operator(torch.fft.rfft, torch.zeros(16))
print("complex-linear:", R.is_complex_linear)
print("derived adjoint passes:", al.check_adjoint(R).passed)


def scaled_inverse(y):
    return 16 * torch.fft.irfft(y, n=16)


report = al.check_adjoint(R, adjoint=scaled_inverse)
print("16 · irfft passes:", report.passed, "–", report.diagnosis)

# %% [markdown]
# `irfft` counts each frequency between the first and the last twice, once for its mirror image; the adjoint of
# `rfft` counts it once. The matrices show it:

# %% Two matrices, the adjoint of rfft and a multiple of irfft, and the ratios of their columns: one, or two
basis = torch.eye(9, dtype=torch.complex64)
derived = torch.stack([R.H(e) for e in basis], 1)
inverse = torch.stack([scaled_inverse(e) for e in basis], 1)
fig, panels = plt.subplots(1, 3, figsize=(8.5, 3.6))
for axes, M, title in zip(panels[:2], (derived, inverse), ("Aᴴ of rfft, real part", "16 · irfft"), strict=True):
    picture = show(axes, M, title, cmap="RdBu", vmin=-2, vmax=2)
fig.colorbar(picture, ax=panels[:2], shrink=0.7, label="entry of the matrix")
norms = (inverse.norm(dim=0) / derived.norm(dim=0)).tolist()
panels[2].bar(range(9), norms)
panels[2].set(title="16 · irfft against Aᴴ", xlabel="frequency", ylabel="ratio of the columns' norms", yticks=[0, 1, 2])
plt.show()

# %% [markdown]
# ## Pitfall 2: `.real`, `.conj()` and casts
#
# The same holds wherever one side is real, and for the antilinear `conj`. `is_complex_linear` tells; the algebra
# refuses what would be wrong, such as a complex multiple of a real operator.

# %%
example = torch.zeros(8, dtype=torch.complex64)
for name, f, domain in (
    ("x.real", lambda x: x.real, example),
    ("x.conj()", lambda x: x.conj(), example),
    ("real x to complex", lambda x: x.to(torch.complex64), torch.zeros(8)),
    ("fft", torch.fft.fft, example),
):
    B = al.linear_operator(f, domain)
    print(f"{name:18s} complex-linear: {B.is_complex_linear!s:6} adjoint passes: {al.check_adjoint(B).passed}")

try:
    1j * al.linear_operator(lambda x: 2 * x, torch.zeros(8))
except al.SpaceMismatchError as refusal:
    print(refusal)

# %% [markdown]
# ## Pitfall 3: the transpose is not the adjoint
#
# `A.T` is $\operatorname{conj}\circ A^H\circ\operatorname{conj}$: right in $\sum_i (Ax)_i\,y_i$, without
# conjugates, and wrong in a gradient.

# %%
al.check_adjoint(A, adjoint=A.T)

# %% [markdown]
# ## What this notebook claims

# %%
eps = torch.finfo(torch.float32).eps
assert A.is_complex_linear
assert al.check_adjoint(A).passed
assert (A.H(z) - by_hand(z)).norm() < 16 * eps * z.norm()
assert not al.check_adjoint(A, adjoint=conjugate_forgotten).passed
assert "conjugate missing" in al.check_adjoint(A, adjoint=A.T).diagnosis
assert error(solution.x) < 0.3 * error(zero_filled)
assert error(zero_filled) < error(forgotten)
assert not R.is_complex_linear
assert al.check_adjoint(R).passed
assert not report.passed
assert abs(norms[0] - 1) < 1e-5
assert all(abs(ratio - 2) < 1e-5 for ratio in norms[1:-1])
assert A.engine == "traced"
