# %% [markdown]
# # Tomography: what an inexact adjoint costs
#
# A Radon transform in a few lines: rotate the image with `grid_sample`, sum along the rays. Its adjoint, the
# *back-projection*, is usually written separately: smear each projection back over the image, rotate, add. That pair is
# "almost" adjoint; GPU toolboxes ship such unmatched pairs because they are fast. Here we see what the difference does.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from skimage import data
from skimage.transform import resize
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
torch.manual_seed(0)


def show(axes, image, title, **options):
    picture = axes.imshow(image, **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


# %%
size, count = 96, 60
truth = torch.from_numpy(resize(data.shepp_logan_phantom(), (size, size), anti_aliasing=True)).float()[None, None]
angles = torch.arange(count) * math.pi / count


def rotations(angles):
    """Sampling grids of the rotated image, one for each angle."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    theta = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
    return F.affine_grid(theta, (len(angles), 1, size, size), align_corners=False)


class Radon(nn.Module):
    """``x ↦ Σ over rows of x rotated``: (1, 1, n, n) to (angles, n)."""

    def __init__(self, angles):
        super().__init__()
        self.register_buffer("grids", rotations(angles))

    def forward(self, x):
        turned = F.grid_sample(x.expand(len(self.grids), -1, -1, -1), self.grids, align_corners=False)
        return turned.sum((1, 2)) / size


A = al.linear_operator(Radon(angles), truth)
sinogram = A(truth)
al.check_adjoint(A)

# %% [markdown]
# ## The back-projection by hand
#
# Smear, rotate back by interpolation, add. It looks right, is right in the continuum, and is what a textbook says.

# %%
back_grids = rotations(-angles)


def back_projection(y):
    smeared = (y / size)[:, None, None, :].expand(-1, 1, size, size)
    return F.grid_sample(smeared, back_grids, align_corners=False).sum(0, keepdim=True)


report = al.check_adjoint(A, adjoint=back_projection)
report

# %%
exact, by_hand = A.H(sinogram)[0, 0], back_projection(sinogram)[0, 0]
fig, panels = plt.subplots(1, 5, figsize=(12, 2.7))
show(panels[0], truth[0, 0], "phantom x")
show(panels[1], sinogram, "sinogram A x", cmap="viridis", aspect="auto")
show(panels[2], exact, "exact Aᴴ of it")
show(panels[3], by_hand, "back-projection by hand")
picture = show(panels[4], by_hand - exact, "difference", cmap="RdBu", vmin=-0.02, vmax=0.02)
fig.colorbar(picture, ax=panels[4], shrink=0.8)
plt.show()
print(f"relative difference of the two: {(by_hand - exact).norm() / exact.norm():.2%}")

# %% [markdown]
# A percent. Does it matter? The two images look the same; but an iteration multiplies by the operator again and again.
#
# ## Gradient steps
#
# With the exact adjoint, $A^H(Ax - y)$ is a gradient and $F$ decreases at every step. With $B \ne A^H$, the steps
# go where $B(Ax - y) = 0$, which is another point, and only if no eigenvalue of $BA$ has a negative real part.

# %%
noise = 0.01 * float(sinogram.abs().max())
y = sinogram + noise * torch.randn(sinogram.shape, generator=torch.Generator().manual_seed(1))
objective = al.LeastSquares(A, y)
norm = float(al.operator_norm(A))


def gradient_steps(adjoint, steps):
    x, values, gradients = A.domain.zeros(), [], []
    for _ in range(steps):
        residual = A(x) - y
        values.append(0.5 * float(residual.square().sum()))
        gradients.append(float(A.H(residual).norm()))
        x = x - 1.8 * adjoint(residual) / norm**2
    return x, values, gradients


steps = 150
with torch.no_grad():
    x_exact, f_exact, g_exact = gradient_steps(A.H, steps)
    x_hand, f_hand, g_hand = gradient_steps(back_projection, steps)

# %% [markdown]
# ## Conjugate gradients
#
# Krylov solvers are fast because they rely on $A^H$ being the adjoint: directions are conjugate only then.
# A pair that is *not* adjoint can be handed to the solver too, as `al.LinearOperator(function, adjoint, domain, codomain)`:
# the constructor believes what it is told.

# %%
unmatched = al.LinearOperator(lambda x: A(x), back_projection, A.domain, A.codomain)


def run_cgls(operator, maxiter):
    values, gradients, errors = [], [], []

    def look(x):
        residual = A(x) - y
        values.append(0.5 * float(residual.square().sum()))
        gradients.append(float(A.H(residual).norm()))
        errors.append(float((x - truth).norm() / truth.norm()))

    solution = al.solvers.cgls(operator, y, maxiter=maxiter, tol=0.0, callback=look)
    return solution, values, gradients, errors


with torch.no_grad():
    matched_run, *matched = run_cgls(A, 60)
    unmatched_run, *mismatched = run_cgls(unmatched, 60)
print("exact:  ", matched_run.reason)
print("by hand:", unmatched_run.reason)

# %%
fig, (left, centre, right) = plt.subplots(1, 3, figsize=(12, 3.4))
left.semilogy(g_exact, label="exact Aᴴ")
left.semilogy(g_hand, label="by hand")
left.set(title="gradient steps: size of the true gradient", xlabel="step", ylabel="‖Aᴴ(A x − y)‖")
left.legend()
for axes, k, title in ((centre, 1, "cgls: size of the true gradient"), (right, 2, "cgls: error of the image")):
    axes.plot(matched[k], label="exact Aᴴ")
    axes.plot(mismatched[k], label="by hand")
    axes.set(title=title, xlabel="step")
centre.set_yscale("log")
right.set(ylabel="‖x − truth‖ / ‖truth‖", ylim=(0, 1))
plt.show()

# %% [markdown]
# With the exact adjoint the gradient goes to zero. With the other one it stops falling far above: the iteration has
# converged, but to a point that is not a minimiser of anything, and conjugate gradients do not converge at all. No error
# message appears anywhere; only the dot test sees it, in a moment, before the first step.
#
# ## The images

# %%
ramp = torch.fft.rfftfreq(size) * 2
filtered = back_projection(torch.fft.irfft(torch.fft.rfft(y) * ramp, n=size))
filtered = filtered * float((filtered * truth).sum() / filtered.square().sum())
best = {}


def stop_at_noise(x):
    return bool((A(x) - y).norm() <= noise * y.numel() ** 0.5)


with torch.no_grad():
    best["cgls until noise, exact Aᴴ"] = al.solvers.cgls(A, y, maxiter=60, tol=0.0, callback=stop_at_noise).x
    best["cgls, 60 steps, by hand"] = unmatched_run.x
    best["filtered back-projection"] = filtered

fig, panels = plt.subplots(1, 4, figsize=(11, 3))
show(panels[0], truth[0, 0], "phantom", vmin=0, vmax=1)
errors = {}
for axes, (name, x) in zip(panels[1:], best.items(), strict=True):
    errors[name] = float((x - truth).norm() / truth.norm())
    show(axes, x[0, 0], f"{name}\nerror {errors[name]:.1%}", vmin=0, vmax=1)
plt.show()

# %% [markdown]
# ## No forward in the adjoint
#
# `grid_sample` is linear in the image, and its derivative reads the image for its shape only. The derived adjoint is
# therefore one scatter per angle, without sampling anything; that the grids depend on neither input nor data is seen too.

# %%
print(A.explain())

# %% [markdown]
# ## What this notebook claims

# %%
assert al.check_adjoint(A).passed
assert not report.passed
assert (by_hand - exact).norm() < 0.05 * exact.norm(), "the two look alike"
assert all(b < a for a, b in zip(f_exact, f_exact[1:], strict=False))
assert g_exact[-1] < 0.5 * g_hand[-1]
assert min(matched[1]) < 0.1 * min(mismatched[1])
assert errors["cgls until noise, exact Aᴴ"] < errors["filtered back-projection"]
assert errors["cgls until noise, exact Aᴴ"] < errors["cgls, 60 steps, by hand"]
assert "grid_sampler_2d_backward" in A.explain()
