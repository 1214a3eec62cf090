# %% [markdown]
# # Non-linear models: Jacobians, phase retrieval, MRI without calibration
#
# Many forward models are not linear. At a point $x_0$ they are nearly so: $f(x_0 + d) \approx f(x_0) + J d$. The
# Jacobian $J$ is a linear operator, and so it has an adjoint, checks and solvers as every operator here.
# `al.jacobian(f, x0)` derives it. We use it twice, each time on data with noise and against plain Adam:
#
# 1. **Phase retrieval**: a photograph from the magnitudes of its coded Fourier transforms. The phases are lost.
# 2. **MRI without calibration**: the image, the relaxation rate of the tissue and the sensitivities of all coils at
#    once, from undersampled echoes of a real brain volume.

# %%
import time
from importlib.resources import as_file, files

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import torch
from skimage import data
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)  # so that the time of the processor is that of the clock, on a busy machine too


def show(axes, image, title, **options):
    picture = axes.imshow(image, **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


# %% [markdown]
# ## A photograph without phases
#
# A detector of light or X-rays counts photons: it sees $|z|^2$ and not the phase of $z$. With a lens, $z$ is the
# Fourier transform of what passes the object $x$. One picture of this kind is not enough to find $x$. So five are
# taken, each with a known mask $m_k$ in the beam, a random pattern of phases in cells of four by four pixels:
#
# $$f(x)_k = |F(m_k \odot x)|^2, \qquad k = 1, \dots, 5.$$
#
# The object is complex: a photograph is its magnitude (how much light passes), another one its phase (how much it
# delays the light). The masks are simulated, and so is the noise.

# %% The magnitude and the phase of the object, the phase of a mask, and its data
size, count, cell, noise = 192, 5, 4, 0.01


def reduced(image):
    image = torch.from_numpy(image / 255).float()[None, None]
    return nn.functional.adaptive_avg_pool2d(image, (size, size))[0, 0]


truth = torch.polar(reduced(data.camera()), torch.pi * (reduced(data.astronaut().mean(-1)) - 0.5))
generator = torch.Generator().manual_seed(0)
cells = 1j ** torch.randint(4, (count, size // cell, size // cell), generator=generator)
masks = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def intensities(x):
    return torch.fft.fft2(masks * x, norm="ortho").abs().square()


y = intensities(truth)
y = y + noise * y.mean() * torch.randn(y.shape, generator=generator)

fig, panels = plt.subplots(1, 4, figsize=(11, 3))
show(panels[0], truth.abs(), "magnitude of the object")
show(panels[1], truth.angle(), "its phase", cmap="viridis")
show(panels[2], masks[0].angle(), "phase of a mask", cmap="twilight", vmin=-torch.pi, vmax=torch.pi)
show(panels[3], torch.fft.fftshift(y[0]).clamp_min(1e-3).log10(), "log₁₀ of its data", cmap="viridis")
plt.show()

# %% [markdown]
# ## The Jacobian at a point
#
# All iterations start at a grey image without phase, as bright as the data say: the transform keeps the energy.

# %%
start = (y.sum() / count).sqrt() / size * torch.ones_like(truth)
J = al.jacobian(intensities, start)
print(J.domain, "→", J.codomain)

# %% [markdown]
# $J$ is the best linear map at $x_0$: what it misses shrinks with the *square* of the step. A step of a tenth leaves a
# hundredth of the error.

# %%
direction = J.domain.randn(torch.Generator().manual_seed(1))
lengths = torch.tensor([1.0, 0.1, 0.01])
missed = torch.stack([(intensities(start + t * direction) - J.value - t * J(direction)).norm() for t in lengths])
print("missed:", "  ".join(f"{float(error):.3g}" for error in missed))

# %% [markdown]
# **$J^H(f(x_0) - y)$ is the gradient.** The objective is $F(x) = \tfrac12\lVert f(x) - y\rVert^2$. Along a direction
# $d$, the residual $r = f(x_0) - y$ changes by $J d$, and $F$ by $\operatorname{Re}\langle J d, r\rangle =
# \operatorname{Re}\langle d, J^H r\rangle$. So $J^H r$ is the gradient of $F$: each error of the data is sent back to
# the pixels that it depends on, as strongly as it depends on them. This is what autograd computes, too.

# %%
gradient = J.H(J.value - y)

leaf = start.clone().requires_grad_()
objective = (intensities(leaf) - y).square().sum() / 2
(by_autograd,) = torch.autograd.grad(objective, leaf)
print("relative difference:", float((gradient - by_autograd).norm() / by_autograd.norm()))

# %% [markdown]
# $|z|^2$ is not holomorphic, so $J$ is linear for real factors only, and $J^H$ is its adjoint for the real inner
# product $\operatorname{Re}\langle\cdot,\cdot\rangle$. The check knows that. It draws $d$ and $v$ and compares
# $\operatorname{Re}\langle J d, v\rangle$ with $\operatorname{Re}\langle d, J^H v\rangle$.

# %%
print("complex-linear:", J.is_complex_linear)
al.check_adjoint(J)

# %% [markdown]
# **Why linearize once?** By the chain rule, $J d = 2 \operatorname{Re}(\bar z \odot F(m \odot d))$ with
# $z = F(m \odot x_0)$. What is expensive to find and depends on $x_0$ alone, $z$, is the same for every $d$. A
# Gauss–Newton step applies $J$ and $J^H$ tens of times at the same point, so `al.jacobian` runs $f$ once, keeps $z$,
# and never runs $f$ again. `explain()` shows the program of $J^H$, with one Fourier transform, and what is kept: here
# $2|z|$ and $z/|z|$, as PyTorch splits the derivative of $|z|^2$.

# %%
print(J.H.explain())

# %%


def milliseconds_of(function, *arguments):
    """Return the shortest time of ten calls."""
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def pulled_back(v):
    return torch.func.vjp(intensities, start)[1](v)


residual = J.value - y
for name, call in {
    "f(x)": (intensities, start),
    "J(d)": (J, direction),
    "J.H(r)": (J.H, residual),
    "torch.func.jvp": (torch.func.jvp, intensities, (start,), (direction,)),
    "torch.func.vjp": (pulled_back, residual),
}.items():
    print(f"{name:15s} {milliseconds_of(*call):5.1f} ms")

# %% [markdown]
# **Another point.** `J.at(x1)` is the Jacobian elsewhere. The program stays as it is, and only $z$ is computed anew.
# Here it is at the truth. There, the direction $i x$ turns the phase of the whole object, which no detector sees:
# $f(e^{i\alpha}x) = f(x)$, so $J(ix) = 0$. This phase stays unknown, and errors below are measured after the best
# turn.

# %%
J_truth = J.at(truth)
unseen = float(J_truth(1j * truth).norm() / J_truth(truth).norm())
print("‖J(i x)‖ / ‖J(x)‖ =", unseen)
print("the data fit there up to the noise:", float((J_truth.value - y).norm() / (noise * y.mean() * y.numel() ** 0.5)))


def turned(x):
    angle = torch.vdot(x.flatten(), truth.flatten())
    return x * angle / angle.abs()


def error(x):
    return float((turned(x) - truth).norm() / truth.norm())


# %% [markdown]
# ## Gauss–Newton and Levenberg–Marquardt against Adam
#
# A Gauss–Newton step minimises $\lVert f(x) + J d - y\rVert^2$, a *linear* least-squares problem, by a few steps of
# `cgls`, and then goes along $d$ as far as the objective falls. `levenberg_marquardt` makes steps that are too long
# shorter by a penalty $\mu\lVert d\rVert^2$. Adam, the usual choice in PyTorch, follows the gradient; its learning rate
# has to be found by trying, and we show three.
#
# All minimise the same $F$ from the same start. The clock of the solvers includes the derivation of the Jacobian, so
# their curves begin late; it stops while an error is computed for the figure.

# %%


class Record:
    """Cost and error over time; the clock stops while it writes."""

    def __init__(self, error):
        self.error = error
        self.times, self.costs, self.errors = [], [], []
        self.begin = time.process_time()

    def __call__(self, x, cost):
        now = time.process_time()
        self.times.append(now - self.begin)
        self.costs.append(float(cost))
        self.errors.append(self.error(x))
        self.begin += time.process_time() - now


def solver(method, f, y, start, error, **options):
    record = Record(error)
    solution = method(f, y, start, callback=lambda x, info: record(x, info.residual**2 / 2), **options)
    print(f"{method.__name__}: {solution.iterations} steps; {solution.reason}")
    return solution.x, record


def adam(cost, start, rate, steps, *, error, until):
    """Run Adam; return x, its record, and the last x before the time ``until``."""
    record = Record(error)
    leaves = [leaf.clone().requires_grad_() for leaf in start]
    optimiser = torch.optim.Adam(leaves, lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        value = cost(*leaves)
        value.backward()
        if time.process_time() - record.begin <= until:
            early = [leaf.detach().clone() for leaf in leaves]
        record([leaf.detach() for leaf in leaves], value.detach())  # the cost is that of x before the step
        optimiser.step()
    return [leaf.detach() for leaf in leaves], record, early


def cost(x):
    return (intensities(x) - y).square().sum() / 2


options = {"maxiter": 40, "tol": 1e-4, "inner": 30}
newton, by_newton = solver(al.solvers.gauss_newton, intensities, y, start, error, **options)
marquardt, by_marquardt = solver(al.solvers.levenberg_marquardt, intensities, y, start, error, **options)
records = {"Gauss–Newton": by_newton, "Levenberg–Marquardt": by_marquardt}
results = {}
for rate in (0.03, 0.1, 0.3):
    (x,), record, (early,) = adam(cost, [start], rate, 300, error=lambda x: error(x[0]), until=by_newton.times[-1])
    records[f"Adam, rate {rate}"], results[rate] = record, (x, early)


# %% Cost and error over time: Adam leads at first, the solvers catch up, the largest rate is thrown off


def curves(records, window=None):
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for name, record in records.items():
        style = {"lw": 1.2} if name.startswith("Adam") else {"marker": "o", "ms": 4}
        left.semilogy(record.times, record.costs, label=name, **style)
        right.semilogy(record.times, record.errors, label=name, **style)
    left.set(title="cost", xlabel="seconds of one core", ylabel="objective F", ylim=window)
    right.set(title="error", xlabel="seconds of one core", ylabel="relative error")
    left.legend()
    plt.show()


curves(records)

# %% [markdown]
# A step of Adam costs one $f$ and one backward pass. A step of the solvers costs up to thirty $J$ and $J^H$, but there
# are few of them, and the last ones gain most, because near the minimum the linear model is nearly exact. So Adam leads
# at first, and the solvers catch up. They have no rate to choose, and they know when to stop. Of the rates of Adam, the
# largest falls fastest and nearly to the minimum, but then it is thrown off; the smaller ones are safe and slow.
#
# Below is what each had found in the time that Gauss–Newton took, Adam with the rate that was best by then.

# %% Magnitude, phase and error: Gauss–Newton and Adam have both found the object in the same time
best = min(results, key=lambda rate: error(results[rate][1]))
adam_x, adam_early = results[best]
images = {"truth": truth, "start": start, "Gauss–Newton": newton, f"Adam {best}, same time": adam_early}
fig, panels = plt.subplots(3, 4, figsize=(11, 8.2))
for k, (name, found) in enumerate(images.items()):
    x = turned(found)
    label = name if name == "truth" else f"{name}: {error(x):.1%}"
    show(panels[0, k], x.abs(), label, vmin=0, vmax=1)
    show(panels[1, k], x.angle(), "phase", cmap="viridis", vmin=-torch.pi / 2, vmax=torch.pi / 2)
    if name in ("truth", "start"):
        panels[2, k].set_axis_off()
    else:
        picture = show(panels[2, k], (x - truth).abs(), "|x − truth|", cmap="magma", vmin=0, vmax=0.1)
fig.colorbar(picture, cax=panels[2, 3].inset_axes([1.05, 0.05, 0.05, 0.9]))
plt.show()

# %% [markdown]
# ## MRI: image, relaxation and coils at once
#
# A scanner measures the Fourier transform of the tissue through several coils, here some rows of it only, and
# several times, while the signal decays. Usually the sensitivities of the coils are measured before. Here they are
# unknowns, as in the method of Uecker and others (2008), and the rate of the decay is one more:
#
# $$f(\rho, q, \hat c)_{tk} = M_t\, F\bigl(\rho\, e^{-t (r_0 + q)}\, c_k\bigr), \qquad c_k = F^{-1}(w \odot \hat c_k).$$
#
# $\rho$ is the image, complex. $r = r_0 + q$ is the rate of the decay, the inverse of the relaxation time $T_2$. $c_k$
# is the sensitivity of coil $k$: its Fourier coefficients are $\hat c_k$ times weights $w$ that fall fast, so that it
# is smooth. The model is linear in none of them together: $\rho$ and $c_k$ are multiplied, and $q$ is in an
# exponential.
#
# The anatomy is real, a slice of the volume that ships with nibabel. The volume says nothing about $T_2$, coils or
# phases, so we make them up: $T_2$ between 40 and 130 ms, longer where the tissue is brighter, six coils on a ring, and
# a smooth phase.

# %%
with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
    scans = np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj, dtype=np.float32)
anatomy = torch.from_numpy(np.rot90(scans[:, :, 11, 0])[:, 20:108].copy())
anatomy = anatomy / torch.quantile(anatomy, 0.999)
height, width = anatomy.shape

v = torch.linspace(-1, 1, height)[:, None]
u = torch.linspace(-1, 1, width)
density = torch.polar(anatomy, (0.8 * u * v + 0.5 * v - 0.7 * u**2).expand_as(anatomy))
brightness = nn.functional.avg_pool2d(anatomy[None], 3, stride=1, padding=1)[0]
rate = 100 / (40 + 90 * brightness.clamp(max=1))  # one in 100 ms
tissue = brightness > 0.15  # elsewhere is air, and no signal that could decay

coils, echoes = 6, 5
angles = torch.arange(coils) * 2 * torch.pi / coils
across, down = 1.2 * torch.cos(angles)[:, None, None], 1.2 * torch.sin(angles)[:, None, None]
phase = 1.5 * (u * down - v * across) + angles[:, None, None]
maps = torch.polar(torch.exp(-((u - across) ** 2 + (v - down) ** 2) / 0.9), phase)
maps = maps / maps.abs().square().sum(0).sqrt()

# %% [markdown]
# The model is a module. Each echo has every third row, each time others, and the rows of low frequency.

# %%
typical = 1.5
times = torch.arange(echoes) * 0.25  # in 100 ms
rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
every_third = (torch.arange(height) + torch.arange(echoes)[:, None]) % 3 == 0
sampled = ((rows.abs() < 0.09) | every_third).float()[:, None, :, None]
smoothness = (1 + 100 * (rows[:, None] ** 2 + columns**2)) ** -4


def fourier(images):
    return torch.fft.fft2(images, norm="ortho")


class Echoes(nn.Module):
    """``(ρ, q, ĉ) ↦ M F (ρ e^{−t (r₀ + q)} c)``: echoes × coils × rows × columns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sampled", sampled)
        self.register_buffer("smoothness", smoothness)
        self.register_buffer("times", times[:, None, None])

    def sensitivities(self, coefficients):
        return torch.fft.ifft2(self.smoothness * coefficients, norm="ortho")

    def forward(self, image, deviation, coefficients):
        decayed = image * torch.exp(-self.times * (typical + deviation))
        return self.sampled * fourier(decayed[:, None] * self.sensitivities(coefficients))


model = Echoes()
measured = sampled * fourier((density * torch.exp(-times[:, None, None] * rate))[:, None] * maps)
measured = measured + 0.005 * sampled * torch.randn(measured.shape, generator=generator, dtype=measured.dtype)
print(f"{float(sampled.mean()):.0%} of the rows measured")

# %% [markdown]
# A *tuple* of unknowns is spread over the arguments of the model. The iterations start where nothing is known: an
# image of ones, the typical rate everywhere, and coils that see nothing.

# %%
beginning = (
    torch.ones(height, width, dtype=torch.complex64),
    torch.zeros(height, width),
    torch.zeros(coils, height, width, dtype=torch.complex64),
)
J_mri = al.jacobian(model, beginning)
print(J_mri.domain, "→", J_mri.codomain)
al.check_adjoint(J_mri)

# %% [markdown]
# **What data do not tell, penalties decide.** Where there is air, nothing decays, and $q$ is unknown. An image twice
# as bright with coils half as sensitive gives the same data. `damp` adds $\tfrac12\,\mathrm{damp}^2\lVert x\rVert^2$:
# it shares the brightness out, keeps the coefficients of the coils small, and in the air draws $r$ to the typical rate.
# A penalty $(\lambda, L)$ adds $\tfrac12\lambda\lVert L x\rVert^2$. Here $L$ takes the differences of $q$ between
# neighbours: the map of rates is made a little smoother.

# %% Cost and error over time: the solvers end below each rate of Adam
differences = al.linear_operator(lambda image, q, coefficients: (q.diff(dim=0), q.diff(dim=1)), J_mri.domain)
damp, strength = 0.05, 1e-3


def squared(z):
    return torch.view_as_real(z).square().sum() if z.is_complex() else z.square().sum()


def cost_mri(*x):
    size = sum(squared(leaf) for leaf in x)
    rough = sum(squared(difference) for difference in differences(x))
    return (squared(model(*x) - measured) + damp**2 * size + strength * rough) / 2


def image_of(x):
    """The image as all coils together see it; only this product is determined."""
    return x[0] * model.sensitivities(x[2]).abs().square().sum(0).sqrt()


def error_image(x):
    return float((image_of(x).abs() - anatomy).norm() / anatomy.norm())


def error_rate(x):
    return float((typical + x[1] - rate)[tissue].norm() / rate[tissue].norm())


options = {"damp": damp, "penalties": [(strength, differences)], "maxiter": 30, "tol": 1e-3, "inner": 30}
methods = (al.solvers.gauss_newton, al.solvers.levenberg_marquardt)
(newton_mri, record_newton), (marquardt_mri, record_marquardt) = (
    solver(method, model, measured, beginning, error_image, **options) for method in methods
)
records_mri = {"Gauss–Newton": record_newton, "Levenberg–Marquardt": record_marquardt}
results_mri = {}
for speed in (0.1, 0.3, 1.0):
    x, record, early = adam(cost_mri, beginning, speed, 300, error=error_image, until=record_newton.times[-1])
    records_mri[f"Adam, rate {speed}"], results_mri[speed] = record, (x, early)

curves(records_mri, window=(8, 40))

# %% [markdown]
# At first Adam is ahead: it makes many steps while the Jacobian is derived. Then it stays behind at each rate. With a
# small one it is slow, with a large one it goes round the minimum. The unknowns are of different kinds and sizes, and
# they depend on each other; the linear model of Gauss–Newton knows both. The images of Adam are again those of the rate
# that was best by the time at which Gauss–Newton had finished.

# %% Images, relaxation times and their errors: those of Gauss–Newton are smaller than those of Adam
best_mri = min(results_mri, key=lambda speed: error_image(results_mri[speed][1]))
columns_mri = {
    "truth": (anatomy, rate),
    "start": (image_of(beginning).abs(), typical + beginning[1]),
    "Gauss–Newton": (image_of(newton_mri).abs(), typical + newton_mri[1]),
    f"Adam {best_mri}, same time": (image_of(results_mri[best_mri][1]).abs(), typical + results_mri[best_mri][1][1]),
}


def milliseconds(rates):
    return torch.where(tissue, 100 / rates.clamp_min(0.1), torch.nan)


fig, panels = plt.subplots(4, 4, figsize=(11, 11))
for k, (name, (picture, rates)) in enumerate(columns_mri.items()):
    show(panels[0, k], picture, name, vmin=0, vmax=1)
    relaxation = show(panels[2, k], milliseconds(rates), "T₂", cmap="viridis", vmin=40, vmax=130)
    if name in ("truth", "start"):
        panels[1, k].set_axis_off()
        panels[3, k].set_axis_off()
        continue
    wrong = (picture - anatomy).norm() / anatomy.norm()
    bad = show(panels[1, k], (picture - anatomy).abs(), f"error {wrong:.1%}", cmap="magma", vmin=0, vmax=0.1)
    wrong = (rates - rate)[tissue].norm() / rate[tissue].norm()
    off = (milliseconds(rates) - milliseconds(rate)).abs()
    late = show(panels[3, k], off, f"error of the rate {wrong:.1%}", cmap="magma", vmin=0, vmax=30)
for row, (picture, label) in {1: (bad, ""), 2: (relaxation, "ms"), 3: (late, "ms")}.items():
    fig.colorbar(picture, cax=panels[row, 3].inset_axes([1.05, 0.05, 0.05, 0.9]), label=label)
plt.show()

# %% [markdown]
# The coils come out as well, each up to a phase that all of them share with the image. Where there is no tissue, no
# data tell anything about them.

# %% The sensitivities of six coils, true above and found below: they look alike
found = model.sensitivities(newton_mri[2])
found = found / found.abs().square().sum(0).sqrt()
fig, panels = plt.subplots(2, coils, figsize=(11, 4.2))
for k in range(coils):
    show(panels[0, k], maps[k].abs() * tissue, f"coil {k + 1}, true", cmap="viridis", vmin=0, vmax=0.8)
    show(panels[1, k], found[k].abs() * tissue, "found", cmap="viridis", vmin=0, vmax=0.8)
plt.show()
error_coils = float(((found.abs() - maps.abs()) * tissue).norm() / (maps.abs() * tissue).norm())
print(f"error of the magnitudes of the coils: {error_coils:.1%}")
print(f"errors with Gauss–Newton: image {error_image(newton_mri):.1%}, rate {error_rate(newton_mri):.1%}")

# %% [markdown]
# ## What this notebook claims

# %%
eps = torch.finfo(torch.float32).eps
assert missed[1] < 0.011 * missed[0]
assert (gradient - by_autograd).norm() < 64 * eps * by_autograd.norm()
assert not J.is_complex_linear
assert al.check_adjoint(J).passed
assert al.check_adjoint(J_truth).passed
assert al.check_adjoint(J_mri).passed
assert torch.equal(J_truth.value, intensities(truth))
assert J.H.explain().count("_fft_c2c(") == 1
assert unseen < 8 * eps
assert max(len(by_newton.costs), len(by_marquardt.costs)) < 30
assert max(error(newton), error(marquardt)) < 0.03
assert max(by_newton.costs[-1], by_marquardt.costs[-1]) < float(cost(truth))
for record in (by_newton, by_marquardt):
    assert all(record.costs[-1] < 1.05 * min(other.costs) for other in records.values())
for record in (record_newton, record_marquardt):
    assert len(record.costs) < 20
    assert all(record.costs[-1] < 0.95 * min(records_mri[f"Adam, rate {speed}"].costs) for speed in results_mri)
assert abs(float(cost_mri(*newton_mri)) - record_newton.costs[-1]) < 1e-4 * record_newton.costs[-1]
assert error_image(newton_mri) < 0.02
assert error_rate(newton_mri) < 0.06
assert error_coils < 0.1
