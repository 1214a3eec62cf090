# %% [markdown]
# # Least squares on a real photograph
#
# A photograph is blurred by a shaking hand, and the sensor adds noise: $y = c\,x + n$ with a `Conv2d`. We recover
# $x$ from $y$ by minimising $F(x) = \tfrac12\lVert c\,x - y\rVert^2$, and compare
#
# - gradient steps $x \leftarrow x - \tau\,c^H(c\,x - y)$, by hand and by `torch.optim`,
# - the Krylov solvers `al.solvers.cgls` and `al.solvers.lsmr`,
# - inverse filtering and Wiener deconvolution, the two classics that divide in the Fourier domain.

# %%
import matplotlib.pyplot as plt
import torch
from skimage import data
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")


def show(axes, image, title, **options):
    picture = axes.imshow(image, **{"vmin": 0, "vmax": 1, **options})
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


def error(x):
    """Relative error ‖x − truth‖ / ‖truth‖."""
    return float((x - truth).norm() / truth.norm())


# %% [markdown]
# ## The forward model
#
# The camera moved along a short path while the shutter was open: the kernel is that path. Nothing is known of the
# scene beyond the frame, so the border is reflected. That is an honest model of a photograph, and with a kernel
# that is not symmetric no Fourier or cosine transform diagonalises it.

# %% The photograph, the kernel of the blur, and the blurred, noisy data
truth = torch.from_numpy(data.camera()[40:296, 120:376] / 255).float()[None, None]

time = torch.linspace(0, 1, 400)
path = torch.stack([8 * time**2 - 3 + torch.sin(5 * time), 7 * time - 4 + 1.5 * torch.cos(4 * time)])
axis = torch.arange(-7.0, 8.0)
bells = torch.exp(-((axis[:, None] - path[:, None, :]) ** 2) / (2 * 0.6**2))  # rows and columns × axis × time
kernel = torch.einsum("it,jt->ij", bells[0], bells[1])
kernel /= kernel.sum()

c = nn.Conv2d(1, 1, 15, padding=7, padding_mode="reflect", bias=False).requires_grad_(False)
c.weight.copy_(kernel)
A = al.linear_operator(c, truth)

generator = torch.Generator().manual_seed(1)
noise = 0.01
y = A(truth) + noise * torch.randn(truth.shape, generator=generator)

fig, panels = plt.subplots(1, 3, figsize=(9, 3), width_ratios=[1, 0.55, 1])
show(panels[0], truth[0, 0], "photograph x")
show(panels[1], kernel, "kernel: a path", vmax=None, cmap="magma")
show(panels[2], y[0, 0], f"data y, noise {noise:.0%}, error {error(y):.1%}")
plt.show()

# %% [markdown]
# ## Gradient steps, by hand and with `torch.optim`
#
# `LeastSquares(A, y)` is a module: calling it gives $F(x)$, which autograd differentiates through `A.H`;
# `.value_and_gradient(x)` gives both in one forward and one adjoint. The largest stable step is below $2/\lVert
# c\rVert^2$.

# %%
F = al.LeastSquares(A, y)
norm = al.operator_norm(A)
steps = 60

histories, errors, results = {}, {}, {}


def record(name, iterates):
    histories[name] = [float(F(x)) for x in iterates]
    errors[name] = [error(x) for x in iterates]
    results[name] = iterates[-1]


iterates = [y]
for _ in range(steps):
    x = iterates[-1]
    iterates.append(x - F.gradient(x) / norm**2)
record("gradient steps", iterates)

for name, make in {
    "SGD, momentum 0.9": lambda p: torch.optim.SGD([p], lr=0.5 / float(norm) ** 2, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam([p], lr=0.02),
}.items():
    x = y.clone().requires_grad_()
    optimiser = make(x)
    iterates = [y]
    for _ in range(steps):
        optimiser.zero_grad()
        F(x).backward()
        optimiser.step()
        iterates.append(x.detach().clone())
    record(name, iterates)

# %% [markdown]
# ## Krylov solvers
#
# `cgls` and `lsmr` need one `A` and one `A.H` a step, as the gradient does, and choose all step lengths themselves.
# The adjoint must be exact for that: see the notebook on tomography for what happens otherwise. All begin at
# the data.

# %%
iterates = [y]
solution = al.solvers.cgls(A, y, x0=y, maxiter=steps, tol=0.0, callback=lambda x, info: iterates.append(x))
record("cgls", iterates)
print(f"cgls: {solution.iterations} steps; {solution.reason}")

iterates = [y]
solution = al.solvers.lsmr(A, y, x0=y, maxiter=steps, atol=0.0, btol=0.0, callback=lambda x, info: iterates.append(x))
record("lsmr", iterates)
print(f"lsmr: {solution.iterations} steps; {solution.reason}")

# %% Curves: the objective falls at every step; the error of the image falls, and then rises again
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for name, history in histories.items():
    style = "--" if name == "lsmr" else "-"
    left.semilogy(history, style, label=name)
    right.semilogy(errors[name], style, label=name)
left.set(title="objective F", xlabel="step = one A and one Aᴴ", ylabel="F(x) = ½‖c x − y‖²")
right.set(title="error: down, then up again", xlabel="step", ylabel="‖x − truth‖ / ‖truth‖")
right.set_yticks([0.06, 0.1, 0.2, 0.4, 0.8], ["6%", "10%", "20%", "40%", "80%"])
right.minorticks_off()
left.legend()
plt.show()

# %% [markdown]
# Left, the Krylov solvers are far ahead of gradient steps. Right, the error falls and then *rises*: late steps fit
# the noise. This is semi-convergence, and the number of steps is the regulariser. A faster solver gets to the best
# image sooner, and past it sooner. The discrepancy principle says when to stop without knowing the truth: when the
# residual is as small as the noise, $\lVert c\,x - y\rVert \le \sigma\sqrt n$. A callback that returns `True` stops
# a solver.

# %%


def cgls_until_noise(A, y, sigma):
    """Run cgls until the residual is as small as the noise."""
    target = sigma * y.numel() ** 0.5
    return al.solvers.cgls(A, y, x0=y, maxiter=200, tol=0.0, callback=lambda x, info: info.residual <= target)


stopped = cgls_until_noise(A, y, noise)
print(f"{stopped.iterations} steps; {stopped.reason}; error {error(stopped.x):.1%}")

# %% [markdown]
# ## The classics
#
# Both assume that the image repeats periodically, so that the blur is a product in the Fourier domain:
#
# $$\hat x_{\text{inverse}} = \frac{\hat y}{\hat k}, \qquad
# \hat x_{\text{Wiener}} = \frac{\overline{\hat k}\,\hat y}{|\hat k|^2 + \lambda}.$$
#
# Wiener's $\lambda$ is given every help: the best of a grid, chosen by looking at the truth. A remedy for the
# border is to mirror the data first, so that they do repeat periodically.

# %%


def spectrum(shape):
    placed = torch.zeros(shape[-2:])
    placed[:15, :15] = kernel.flip(0, 1)  # a convolution layer correlates: a true convolution has the flipped kernel
    return torch.fft.fft2(placed.roll((-7, -7), (0, 1)))


def inverse_filter(y):
    return torch.fft.ifft2(torch.fft.fft2(y) / spectrum(y.shape)).real


def wiener(y, strength):
    k = spectrum(y.shape)
    return torch.fft.ifft2(k.conj() * torch.fft.fft2(y) / (k.abs() ** 2 + strength)).real


def mirrored(y):
    y = torch.cat([y, y.flip(-1)], -1)
    return torch.cat([y, y.flip(-2)], -2)


def best_wiener(y):
    return min((wiener(y, s) for s in STRENGTHS), key=error)


def best_mirrored_wiener(y):
    n, m = y.shape[-2:]
    return min((wiener(mirrored(y), s)[..., :n, :m] for s in STRENGTHS), key=error)


STRENGTHS = torch.logspace(-5, 0, 16)
classics = {"inverse filter": inverse_filter(y), "Wiener": best_wiener(y), "Wiener, mirrored": best_mirrored_wiener(y)}
for name, x in {**classics, "cgls until noise": stopped.x}.items():
    print(f"{name:18s} error {error(x):8.1%}")

# %% Images by five methods, and their errors: the inverse filter is noise, cgls and the mirrored Wiener filter are good
inner = (slice(None), slice(None), slice(20, -20), slice(20, -20))


def inner_error(x):
    return float((x[inner] - truth[inner]).norm() / truth[inner].norm())


fig, panels = plt.subplots(2, 5, figsize=(12.5, 5.3))
columns = {"data y": y, **classics, "cgls until noise": stopped.x}
for (name, x), top, bottom in zip(columns.items(), *panels, strict=True):
    show(top, x[0, 0], f"{name}\nerror {error(x):.1%}, inside {inner_error(x):.1%}")
    show(bottom, (x - truth).abs()[0, 0], "|x − truth|", cmap="magma", vmax=0.35)
plt.show()

# %% [markdown]
# The inverse filter divides noise by almost nothing. Wiener's filter rings from the border, where its periodic
# model is wrong. Mirroring cures that almost entirely: on this problem, Wiener's formula with a $\lambda$ chosen by
# the truth is as good as the iteration, and it is one line. If your model *is* a convolution of a whole image, use
# it.
#
# ## What no formula covers
#
# It stops there. Suppose that every second pixel of the sensor is read out in each direction, and a third of those
# are dead. The model is `diagonal(mask) @ A2`; nothing else changes.

# %% Photograph, data with dead pixels, and two recovered images: that with the penalty is clean
c2 = nn.Conv2d(1, 1, 15, stride=2, padding=7, padding_mode="reflect", bias=False).requires_grad_(False)
c2.weight.copy_(kernel)
A2 = al.linear_operator(c2, truth)
mask = (torch.rand(A2.codomain.zeros().shape, generator=generator) > 1 / 3).float()
B = al.diagonal(mask) @ A2
y2 = B(truth) + 0.003 * mask * torch.randn(mask.shape, generator=generator)

smooth = 0.1 * al.linear_operator(lambda x: (x.diff(dim=-1), x.diff(dim=-2)), truth)
stacked = al.vstack([B, smooth])
recovered = al.solvers.cgls(stacked, (y2, smooth.codomain.zeros()), maxiter=60).x
without = al.solvers.cgls(B, y2, maxiter=15, tol=0.0).x

fig, panels = plt.subplots(1, 4, figsize=(11, 3))
show(panels[0], truth[0, 0], "photograph, 256 × 256")
show(panels[1], y2[0, 0], "data: 128 × 128, a third dead")
show(panels[2], without[0, 0], f"cgls, 15 steps\nerror {error(without):.1%}")
show(panels[3], recovered[0, 0], f"with a penalty on differences\nerror {error(recovered):.1%}")
plt.show()

# %% [markdown]
# The penalty is one more operator in the stack: $\min \lVert Bx - y\rVert^2 + \lVert 0.1\,\nabla x\rVert^2$, with
# the adjoint of $\nabla$ derived as well.
#
# ## Noise study
#
# The same comparison from a few hundredths of a percent to three percent noise.

# %% Curves: errors grow with the noise, and cgls takes fewer steps
levels = [0.0003, 0.001, 0.003, 0.01, 0.03]
study = {"data y": [], "Wiener": [], "Wiener, mirrored": [], "cgls until noise": []}
steps_needed = []
for sigma in levels:
    noisy = A(truth) + sigma * torch.randn(truth.shape, generator=generator)
    solution = cgls_until_noise(A, noisy, sigma)
    steps_needed.append(solution.iterations)
    for name, x in zip(study, (noisy, best_wiener(noisy), best_mirrored_wiener(noisy), solution.x), strict=True):
        study[name].append(error(x))

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for name, values in study.items():
    left.loglog(levels, values, "o-", label=name)
left.set(xlabel="noise σ", ylabel="relative error", title="error against noise")
left.set_yticks([0.02, 0.05, 0.1, 0.2], ["2%", "5%", "10%", "20%"])
left.legend(loc="lower right")
right.semilogx(levels, steps_needed, "o-")
right.set(xlabel="noise σ", ylabel="steps of cgls", title="the less noise, the more steps are worth taking")
for axes in (left, right):
    axes.set_xticks(levels, [f"{level:.2%}" for level in levels])
    axes.minorticks_off()
plt.show()

# %% [markdown]
# ## Damping instead of stopping
#
# `damp` adds $\tfrac12\,\text{damp}^2\lVert x\rVert^2$ to the objective (Tikhonov): then the solver may run to the
# end.

# %%
damps = [0.01, 0.03, 0.1, 0.3]
damped = [al.solvers.lsmr(A, y, damp=damp, maxiter=200) for damp in damps]
for damp, solution in zip(damps, damped, strict=True):
    print(f"damp {damp:4}: {solution.iterations:3d} steps, error {error(solution.x):6.1%}; {solution.reason}")

# %% [markdown]
# ## What this notebook claims

# %%
late = {name: values[-1] for name, values in histories.items()}
assert al.check_adjoint(A).passed
assert all(b < a for a, b in zip(histories["gradient steps"], histories["gradient steps"][1:], strict=False))
assert late["cgls"] < late["SGD, momentum 0.9"] < late["gradient steps"]
assert late["lsmr"] < late["gradient steps"]
assert min(errors["cgls"]) < errors["cgls"][-1], "semi-convergence"
assert error(stopped.x) < min(error(x) for x in (y, *classics.values()))
for cgls_error, plain, mirror in zip(
    study["cgls until noise"], study["Wiener"], study["Wiener, mirrored"], strict=True
):
    assert cgls_error < plain
    assert cgls_error < 1.3 * mirror
assert al.check_adjoint(stacked).passed
assert error(recovered) < error(without)
assert error(recovered) < 0.12
assert damped[-1].converged
