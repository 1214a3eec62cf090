# %% [markdown]
# # Recurrences: imaging with waves
#
# A simulation in time is one linear step, applied thousands of times. `al.recurrence` derives the adjoint of that step
# once, and runs it backwards in time. No state is stored. We use it for two problems with waves:
#
# 1. **Seismic imaging**: reflectors in the ground from the echoes of three shots, by least-squares migration.
# 2. **Photoacoustic imaging**: the pressure that a flash of light has made in tissue, from the sound at sensors around
#    it. There, *time reversal* is often taken for the adjoint. We look at the difference.
#
# At the end, we measure how memory grows with the number of steps.

# %%
import ctypes
import gc
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
torch.manual_seed(0)
torch.set_num_threads(1)


def show(axes, image, title, **options):
    picture = axes.imshow(image, **{"aspect": "auto", "cmap": "gray", **options})
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


# %% [markdown]
# ## A step of the wave equation
#
# The pressure $u$ in a medium of speed $c$ obeys $\partial_t^2 u = c^2 \Delta u + f$. Differences in time and space
# make a step of it, from the last two pressures to the next. In a border of 14 cells the wave is damped, since it shall
# leave the region and not come back. The parameter of the step is $m = c^2 \tau^2 / h^2$, where $\tau$ is the length
# of a step and $h$ that of a cell. The state is a pair of pressures, here for several shots at once.

# %%
border = 14


def laplacian(u):
    p = F.pad(u, (1, 1, 1, 1))
    return p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2] - 4 * u


def damping_of(rows, columns, top=True):
    """Return a damping that grows quadratically into the border."""

    def ramp(n, first):
        inside = torch.arange(n)
        depth = torch.maximum(border - inside if first else torch.zeros(n), inside - (n - 1 - border)).clamp_min(0)
        return depth / border

    return 0.25 * torch.maximum(ramp(rows, top)[:, None], ramp(columns, True)) ** 2


def leapfrog(u, before, m, damping):
    return (2 * u - (1 - damping) * before + m * laplacian(u)) / (1 + damping)


class Wave(nn.Module):
    """``((u, u₋), f) ↦ ((u₊, u), traces)``: each shot has a source, and all have receivers in one row."""

    def __init__(self, m, sources, row):
        super().__init__()
        self.m = nn.Parameter(m)
        self.register_buffer("damping", damping_of(*m.shape))
        self.sources, self.row = sources, row

    def forward(self, state, pressure):
        u, before = state
        after = leapfrog(u, before, self.m, self.damping)
        after[torch.arange(len(u)), self.row, self.sources] += pressure
        return (after, u), u[:, self.row, border:-border]


# %% [markdown]
# ## Seismic imaging
#
# Below water there are five layers, some with a step in them as a fault makes. Cells are 10 m wide, steps 2 ms long.
# Three shots are fired near the surface, and receivers in all cells of one row record the echoes. The signal is a
# Ricker wavelet of 14 Hz.

# %% The speed in the ground, the smooth speed that is known, and the echoes of one shot: hyperbolas
height, width, steps, cell, tick = 86, 124, 400, 10.0, 2e-3
depth = torch.arange(height)[:, None] - border
along = torch.arange(width)
tilt = 0.06 * (along - width / 2)
fault = 5 * (along > 0.55 * width)
speed = 1500 + torch.zeros(height, width)
for top, faster in ((18, 150), (25, 200), (32, 250), (40, -200), (48, 350)):
    speed = speed + faster * (depth > top + tilt + (fault if top > 24 else 0))


def smooth(image, cells):
    x = torch.arange(-3 * cells, 3 * cells + 1)
    bell = torch.exp(-((x / cells) ** 2) / 2)
    bell = bell / bell.sum()
    p = F.pad(image[None, None], (3 * cells,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(p, bell[None, None, None]), bell[None, None, :, None])[0, 0]


background = 1 / smooth(1 / speed, 4)
sources, row = torch.tensor([32, 62, 92]), border + 2
when = tick * torch.arange(steps) - 0.09
wavelet = (1 - 2 * (torch.pi * 14 * when) ** 2) * torch.exp(-((torch.pi * 14 * when) ** 2))
shots = wavelet[:, None].expand(steps, len(sources)).contiguous()


def model(speed):
    step = Wave((speed * tick / cell) ** 2, sources, row)
    quiet = torch.zeros(len(sources), height, width)
    return step, al.recurrence(step, (quiet, quiet.clone()), inputs=(steps, len(sources)))


known, A = model(background)
print(A)
with torch.no_grad():
    echoes = model(speed)[1](shots) - A(shots)

inside = (slice(border, -border), slice(border, -border))
fig, panels = plt.subplots(1, 3, figsize=(11, 3))
for axes, image, title in ((panels[0], speed, "speed in the ground"), (panels[1], background, "what is known of it")):
    picture = show(axes, image[inside], title, cmap="viridis", vmin=1500, vmax=2300)
    axes.plot(sources - border, torch.full((3,), row - border), "v", color="white", ms=5)
fig.colorbar(picture, ax=panels[1], label="m/s")
top = float(echoes.abs().max())
show(panels[2], echoes[:, 1], "echoes of the middle shot, over time", vmin=-0.3 * top, vmax=0.3 * top)
plt.show()

# %% [markdown]
# **A is linear in the sources**, and `A.H` sends traces back to them. The check draws random signals and random traces
# and compares $\langle A x, y\rangle$ with $\langle x, A^H y\rangle$.

# %%
al.check_adjoint(A)

# %% [markdown]
# **The image** is the change $\delta m$ of the parameter of the step. To first order, the change of the field obeys the
# same equation, with the source $\delta m \odot \Delta u_t$. This is the *Born approximation*: each cell that differs
# from the background scatters the wave that comes by. For fixed waves $u_t$ it is linear in $\delta m$. So it is a
# recurrence, too: its state is the scattered field and $\delta m$ itself, which stays as it is, and $\Delta u_t$ is
# different at each step (`xs`).

# %%
with torch.no_grad():
    u = before = torch.zeros(len(sources), height, width)
    scatterers = []
    for pressure in shots:
        scatterers.append(laplacian(u))
        (u, before), _ = known((u, before), pressure)
    scatterers = torch.stack(scatterers)

m, damping = known.m.detach(), known.damping


def scattered(state, source):
    u, before, image = state
    after = leapfrog(u, before, m, damping) + image * source / (1 + damping)
    return (after, u, image), u[:, row, border:-border]


quiet = torch.zeros(len(sources), height, width)
fields = al.recurrence(scattered, (quiet, quiet.clone(), torch.zeros(height, width)), xs=scatterers)
start = al.linear_operator(lambda image: (torch.zeros_like(quiet), torch.zeros_like(quiet), image), (height, width))
born = fields @ start
print(born)
al.check_adjoint(born)

# %% [markdown]
# **Learning gives the same operator.** A itself can be differentiated in $m$: the gradient of
# $\operatorname{Re}\langle A_m x, r\rangle$ in $m$ is the adjoint of the Born operator, applied to $r$. It takes two
# sweeps and the memory of $2\sqrt T$ states, where the series $\Delta u_t$ above takes that of $T$.

# %%
(by_autograd,) = torch.autograd.grad((A(shots) * echoes).sum(), known.m)
migrated = born.H(echoes)
print("relative difference:", float((by_autograd - migrated).norm() / migrated.norm()))

# %% [markdown]
# **Migration and least squares.** $B^H$ applied to the echoes is the *migrated* image. It has the reflectors in their
# places, but it is no inverse: it is bright below the sources and blurred by the wavelet, and it has long waves that
# are no reflectors. Least-squares migration minimises $\tfrac12\lVert B\,\delta m - y\rVert^2$ by `cgls`, with a few
# $B$ and $B^H$. The echoes are those of the full simulation, with all that the Born approximation leaves out, so the
# residual does not go to zero. Only what lies below the sources is shown and sought; above, the image is zero.

# %% The true change, the migrated image with its bright spots, the image by least squares, and the residual
below = torch.zeros(height, width)
below[row + 8 : -border, border:-border] = 1
masked = born @ al.diagonal(below)
residuals = []
solution = al.solvers.cgls(
    masked, echoes, maxiter=12, tol=0.0,
    callback=lambda x, info: residuals.append(info.residual / float(echoes.norm())),
)  # fmt: skip
change = ((speed * tick / cell) ** 2 - m) * below


def correlation(image):
    a, b = (laplacian(each)[inside][14:-3, 3:-3] for each in (image, change))
    return float((a * b).sum() / (a.norm() * b.norm()))


fig, panels = plt.subplots(1, 4, figsize=(12, 2.9), width_ratios=(1, 1, 1, 0.8))
for axes, image, title in (
    (panels[0], change, "true change of m"),
    (panels[1], migrated * below, f"migrated, correlation {correlation(migrated):.2f}"),
    (panels[2], solution.x, f"least squares, correlation {correlation(solution.x):.2f}"),
):
    bound = float(image[inside][20:].abs().quantile(0.98))
    show(axes, image[inside], title, vmin=-bound, vmax=bound)
panels[3].plot([1.0, *residuals], "o-", ms=4)
panels[3].set(title="relative residual", xlabel="step of cgls", ylim=(0, 1.05), xticks=range(0, 13, 3))
plt.show()

# %% [markdown]
# ## Photoacoustics: time reversal is not the adjoint
#
# A flash of light heats tissue where it is absorbed. The tissue expands, and the pressure $p_0$ leaves as sound, which
# sensors around it record: $y = A p_0$. The two natural ways back are easy to confuse:
#
# - the **adjoint** $A^H$ plays the traces backwards *from* the sensors, as sources;
# - **time reversal** plays them backwards as the *value* of the pressure at the sensors.
#
# In a closed ring of sensors and long enough, time reversal returns $p_0$: it is near to an inverse, $A^{-1}$, and not
# to $A^H$. With sensors on one side only, as here, it is neither.

# %%
side, instants = 92, 180
square = damping_of(side, side)
angles = torch.pi * (0.05 + torch.arange(70) / 70 * 0.9)
rows = (side / 2 - 28 * torch.sin(angles)).round().long()
columns = (side / 2 + 28 * torch.cos(angles)).round().long()
places = torch.unique(torch.stack([rows, columns]), dim=1)  # one sensor a cell
rows, columns = places

axis = torch.arange(side) - side / 2
pressure = torch.zeros(side, side)
for x, y, radius, value in ((-9, 5, 5, 1.0), (8, -6, 4, 0.8), (5, 11, 6, 0.5), (-6, -12, 2.5, 1.0), (14, 4, 2.5, 0.9)):
    pressure += value * ((axis - x) ** 2 + (axis[:, None] - y) ** 2 < radius**2)
for offset in (-18, -15):
    pressure += 0.7 * (((axis[:, None] - axis - offset).abs() < 1.2) & (axis.abs() < 14) & (axis[:, None].abs() < 20))
pressure = smooth(pressure, 1)


def listen(state):
    u, before = state
    return (leapfrog(u, before, 0.25, square), u), u[rows, columns]


rest = torch.zeros(side, side)
sound = al.recurrence(listen, (rest, rest.clone()), steps=instants)
flash = al.linear_operator(lambda p: (p, p), (side, side))  # at rest: the pressure was the same a step before
A_sound = sound @ flash
print(A_sound)

heard = A_sound(pressure)
heard = heard + 0.02 * heard.abs().max() * torch.randn(heard.shape)


def impose(state, values):
    u, before = state
    after = leapfrog(u, before, 0.25, square)
    after[rows, columns] = values
    return after, u


reverse = al.recurrence(impose, (rest, rest.clone()), inputs=(instants, len(rows)))
last = al.linear_operator(lambda after, before: after, reverse.codomain)
flipped = al.linear_operator(lambda traces: traces.flip(0), (instants, len(rows)))
time_reversal = last @ reverse @ flipped
print(time_reversal)

# %% [markdown]
# Both are linear operators from traces to images, so the check can say whether one is the adjoint of $A$. The derived
# adjoint passes; time reversal is told to be something else.

# %%
print(al.check_adjoint(A_sound))
print(al.check_adjoint(A_sound, adjoint=time_reversal))

# %% [markdown]
# **In a solver.** Time reversal is a good first guess: repeated, $p \leftarrow p + G\,(y - A p)$ with $G$ the time
# reversal, it fits the data fast at first. But it minimises nothing. Solvers are built on the adjoint: `cgls` minimises
# $\lVert A p - y\rVert$, and its residual falls at each step. Given time reversal in place of $A^H$, the same solver
# stalls, without a word. `al.from_pair` refuses such a pair, unless it is told not to look.

# %% The pressure, both ways back, and the least-squares solution; the solver that is given time reversal stalls
rounds, eps = 15, torch.finfo(torch.float32).eps
size = float(heard.norm())


def solved(operator):
    history = [1.0]
    keep = lambda x, info: history.append(float((A_sound(x) - heard).norm()) / size)  # noqa: E731
    return al.solvers.cgls(operator, heard, maxiter=rounds, tol=0.0, callback=keep).x, history


best, falls = solved(A_sound)
pair = al.from_pair(A_sound, time_reversal, A_sound.domain, A_sound.codomain, check=False)
_, stalls = solved(pair)
p, repeated = torch.zeros(side, side), [1.0]
for _ in range(rounds):
    p = p + time_reversal(heard - A_sound(p))
    repeated.append(float((A_sound(p) - heard).norm()) / size)


def error(image):
    return float((image - pressure).norm() / pressure.norm())


once_back, once_reversed = A_sound.H(heard), time_reversal(heard)
once_back = once_back * float((once_back * pressure).sum() / once_back.square().sum())  # its scale is arbitrary
fig, panels = plt.subplots(1, 5, figsize=(13, 2.9), width_ratios=(1, 1, 1, 1, 1.2))
for axes, image, title in (
    (panels[0], pressure, "pressure, and sensors"),
    (panels[1], once_back, f"Aᴴ y, scaled: error {error(once_back):.0%}"),
    (panels[2], once_reversed, f"time reversal: error {error(once_reversed):.0%}"),
    (panels[3], best, f"least squares: error {error(best):.0%}"),
):
    show(axes, image[inside], title, vmin=-0.3, vmax=1.0, aspect="equal")
panels[0].plot(columns - border, rows - border, ".", color="#d9622b", ms=3)
panels[4].semilogy(falls, label="cgls, with Aᴴ")
panels[4].semilogy(stalls, label="cgls, with time reversal for Aᴴ")
panels[4].semilogy(repeated, label="time reversal, repeated")
panels[4].set(title="relative residual", xlabel="step", xticks=range(0, 16, 5))
panels[4].yaxis.set_minor_formatter("{x:.1f}")
panels[4].yaxis.set_major_formatter("{x:.1f}")
panels[4].legend()
plt.show()

# %% [markdown]
# ## Steps against memory
#
# Three ways through a wave on 192² cells, with more and more steps. A loop in Python whose gradient autograd computes
# keeps several arrays a step. The recurrence keeps none for A and `A.H`, and the states of $2\sqrt T$ steps for
# gradients in the parameter. Linux reports the most memory that the process has held.

# %% Memory against the number of steps: that of autograd grows with T, that of A.H does not, gradients are between


class Drum(nn.Module):
    """A wave on a square that is held at its border, with one source, and a row of receivers."""

    def __init__(self, n):
        super().__init__()
        self.m = nn.Parameter(torch.full((n, n), 0.2))

    def forward(self, state, source):
        u, before = state
        after = 2 * u - before + self.m * laplacian(u)
        after[len(u) // 2, len(u) // 2] += source
        return (after, u), u[4]


drum = Drum(192)


def beats(steps):
    return al.recurrence(drum, (torch.zeros(192, 192), torch.zeros(192, 192)), inputs=(steps,))


def by_loop(x):
    state, traces = (torch.zeros(192, 192), torch.zeros(192, 192)), []
    for source in x:
        state, trace = drum(state, source)
        traces.append(trace)
    torch.stack(traces).square().sum().backward()


def forth_and_back(x):
    A = beats(len(x))
    with torch.no_grad():
        A.H(A(x))


def megabytes(field):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def memory(run, steps):
    x = torch.randn(steps)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    run(x)
    return megabytes("VmHWM") - before


ways = {
    "a loop, and autograd": (by_loop, (125, 250, 500)),
    "gradient in m, by two sweeps": (lambda x: beats(len(x))(x).square().sum().backward(), (125, 500, 2000)),
    "A and A.H": (forth_and_back, (125, 500, 2000)),
}
for run, _ in ways.values():
    run(torch.randn(4))  # what is made once
used = {label: {steps: memory(run, steps) for steps in counts} for label, (run, counts) in ways.items()}
loop, gradient, adjoint = used.values()

fig, axes = plt.subplots(figsize=(6, 3.4))
for label, found in used.items():
    axes.loglog(list(found), [max(size, 1.0) for size in found.values()], "o-", label=label)
axes.set(title="memory, 192² cells", xlabel="steps T", ylabel="MB")
axes.set_xticks((125, 500, 2000), ("125", "500", "2000"))
axes.xaxis.set_minor_formatter("")
axes.legend()
plt.show()

# %% [markdown]
# ## What this notebook claims

# %%
assert al.check_adjoint(A).passed
assert al.check_adjoint(born).passed
assert (by_autograd - migrated).norm() < 1000 * eps * migrated.norm()
assert correlation(solution.x) > correlation(migrated) + 0.05
assert residuals[-1] < 0.6
assert al.check_adjoint(A_sound).passed
assert not al.check_adjoint(A_sound, adjoint=time_reversal).passed
assert falls[-1] < 0.2
assert falls[-1] < min(repeated)
assert min(stalls) > 1.3 * falls[-1]
assert error(best) < min(error(once_back), error(once_reversed)) - 0.1
assert loop[500] > 3 * loop[125]
assert gradient[2000] < 8 * max(gradient[125], 2.0)
assert gradient[2000] < loop[500] / 4
assert adjoint[2000] < gradient[2000]
