# %% [markdown]
# # Performance: no forward, the right kernel, one compiled region
#
# Three things make a derived adjoint fast:
#
# 1. the vector-Jacobian product is traced *once*, and the forward pass in it is dropped;
# 2. convolutions are *lowered* to the fastest equal kernel: native, flipped, tap by tap, several outputs
#    at a time, or by FFT;
# 3. what is left can go through `torch.compile` as one region.
#
# Times below were measured when this notebook was run, on one thread, and will differ elsewhere; what is asserted at
# the end are op counts and accuracies, which do not. The careful measurements (`make bench`) come last.

# %%
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Image
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
_ = torch.manual_seed(0)


def measure(functions, rounds=15):
    """Least times in milliseconds, since what else a machine does only adds; in turns, so that all see the same."""
    times = {name: [] for name in functions}
    for _ in range(2):
        for f in functions.values():
            f()
    for _ in range(rounds):
        for name, f in functions.items():
            begin = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: min(t) for name, t in times.items()}


print("torch", torch.__version__, "with", torch.get_num_threads(), "thread(s)")

# %% [markdown]
# ## No forward in the adjoint
#
# A chain of twelve convolutions. Its vector-Jacobian product by autograd runs the forward first and keeps its
# intermediate results. None of that is needed: the derivative of a convolution reads the input for its shape only.

# %%
chain = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(12)]).requires_grad_(False)
A = al.linear_operator(chain, (1, 4, 96, 96))
E = al.linear_operator(chain, (1, 4, 96, 96), engine="eager")
account = A.explain()
print("\n".join(account.splitlines()[1:8]))

# %%
v = A.codomain.randn()
with torch.no_grad():
    times = measure(
        {"eager vector-Jacobian product": lambda: E.H(v), "derived": lambda: A.H(v), "forward": lambda: A(v)}
    )
print(f"eager / derived: {times['eager vector-Jacobian product'] / times['derived']:.1f}")

# %% [markdown]
# Building it costs nothing of the size of the data: the trace runs on fake tensors. This operator acts on vectors of
# eight billion numbers, which do not fit here; its adjoint is derived all the same.

# %%
begin = time.perf_counter()
program = al.linear_operator(chain, (512, 4, 2048, 2048), check=False)
print(
    f"{program.domain.size / 1e9:.1f} billion numbers; derived in {time.perf_counter() - begin:.2f} s; {program.engine}"
)

# %% [markdown]
# ## The right kernel
#
# `conv_transpose2d` *is* the adjoint of a convolution with zero padding, and for images of one channel it is among
# the slowest ways to compute it. A plain convolution with the flipped kernel, one of which neighbouring outputs are the
# channels, a sum of shifted images, or a product of Fourier transforms is equal. Which is fastest depends on the sizes;
# a cost model decides, and a short measurement settles what is close.

# %%
size, kernels = 112, (3, 5, 9, 15, 23)


def compare(k):
    """Times, errors against float64 and the kernel chosen, for the adjoint of a k × k convolution."""
    c = nn.Conv2d(1, 1, k, padding=k // 2, bias=False).requires_grad_(False)
    B = al.linear_operator(c, (1, 1, size, size))
    plain = al.linear_operator(c, (1, 1, size, size), lowering=False)
    u = B.codomain.randn()
    ways = {
        "conv_transpose2d": lambda: F.conv_transpose2d(u, c.weight, padding=k // 2),
        "derived, not lowered": lambda: plain.H(u),
        "derived": lambda: B.H(u),
    }
    with torch.no_grad():
        times = measure(ways, rounds=9)
        exact = F.conv_transpose2d(u.double(), c.weight.double(), padding=k // 2)
        gaps = {name: float((ways[name]() - exact).norm() / exact.norm()) for name in ways}
    (line,) = [line for line in B.explain().splitlines() if line.startswith("kernel: ") and "transposed" in line]
    return times, gaps, line.removeprefix("kernel: ").split(",")[0]


results = [compare(k) for k in kernels]
for k, (times, _, chosen) in zip(kernels, results, strict=True):
    ratio = times["conv_transpose2d"] / times["derived"]
    print(f"{k:2d} × {k:<2d}: {chosen:24s} conv_transpose2d / derived: {ratio:6.1f}")

# %% Curves of times against the width of the kernel: the derived adjoint is fastest; and bars of equal errors
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
LOOKS = {  # what may lie on another line is drawn beneath it, wide
    "conv_transpose2d": {"lw": 5, "alpha": 0.4, "marker": "s", "ms": 9},
    "derived, not lowered": {"lw": 1.5, "marker": "o", "ms": 4},
    "derived": {"lw": 1.8, "marker": "o", "ms": 5},
}
for name, look in LOOKS.items():
    left.loglog(kernels, [times[name] for times, _, _ in results], label=name, **look)
left.set(title=f"adjoint of a convolution of {size} × {size}", xlabel="width of the kernel", ylabel="ms")
left.set_xticks(kernels, kernels)
left.minorticks_off()
left.legend()
eps = torch.finfo(torch.float32).eps
for shift, (name, colour) in zip((-0.2, 0.2), (("conv_transpose2d", "#8fb3dd"), ("derived", "#3d9950")), strict=True):
    places = [i + shift for i in range(len(kernels))]
    right.bar(places, [gaps[name] / eps for _, gaps, _ in results], width=0.38, color=colour, label=name)
right.set(title="error against float64", xlabel="width of the kernel", ylabel="relative error, in eps")
right.set_xticks(range(len(kernels)), kernels)
right.grid(visible=False, axis="x")
right.legend()
plt.show()

# %% [markdown]
# The derived adjoint stays accurate: a kernel that loses more than a factor of four against the native one is not
# used, and every lowered program is compared with the plain vector-Jacobian product before it runs.
#
# What depends on the weights alone, such as their Fourier transform, is kept between calls and made again when they
# change. That a training step changes them in place is seen:

# %%
c = nn.Conv2d(1, 1, 15, padding=7, bias=False).requires_grad_(False)
B = al.linear_operator(c, (1, 1, size, size))
u = B.codomain.randn()
before = B.H(u)
c.weight.mul_(2)
print("doubled weights are seen:", torch.allclose(B.H(u), 2 * before, rtol=1e-4, atol=1e-5))

# %% [markdown]
# ## The forward, too
#
# The same choice is made for the forward convolution, so a wrapped module can be faster than the module.

# %%
c = nn.Conv2d(1, 1, 25, padding=12, padding_mode="circular", bias=False).requires_grad_(False)
B = al.linear_operator(c, (1, 1, size, size))
x = B.domain.randn()
leaf = x.clone().requires_grad_()
objective = al.LeastSquares(B, B.codomain.randn())


def by_autograd():
    (gradient,) = torch.autograd.grad(0.5 * (c(leaf) - objective.y).square().sum(), leaf)
    return gradient


with torch.no_grad():
    times = measure({"c(x)": lambda: c(x), "A(x)": lambda: B(x), "gradient": lambda: objective.gradient(x)}, rounds=5)
times |= measure({"autograd": by_autograd}, rounds=5)
print(f"c(x) / A(x): {times['c(x)'] / times['A(x)']:.1f}; gradient by autograd / by adjointlab: "
      f"{times['autograd'] / times['gradient']:.1f}")  # fmt: skip

# %% [markdown]
# ## Compiled
#
# For chains of cheap elementwise ops, calls and passes over memory are what costs. `A.compile()` puts `A` and `A.H`
# through `torch.compile`, compares the result with eager on random data, and falls back with a reason where it does
# not agree.
#
# Two examples. Finite differences are so simple that an adjoint written by hand, in place, is hard to beat: what the
# derived one saves is the writing, and the testing. Weighted second differences are a chain of some twenty ops, and
# few would write their adjoint by hand. There the rival is autograd's vector-Jacobian product, and compiling pays.

# %% Bars of times: adjoints by hand, by autograd, derived, and derived and compiled
side = 1024
weights = torch.rand(4, side, side)


def differences(x):
    return x[1:] - x[:-1], x[:, 1:] - x[:, :-1]


def second_differences(x):
    x = weights[0] * x
    rows, columns = x.diff(n=2, dim=0), x.diff(n=2, dim=1)
    mixed = x.diff(dim=0).diff(dim=1)
    return weights[1, 2:] * rows, weights[2, :, 2:] * columns, weights[3, 1:, 1:] * mixed


def by_hand(p):
    rows, columns = p
    x = torch.zeros(side, side)
    x[1:] += rows
    x[:-1] -= rows
    x[:, 1:] += columns
    x[:, :-1] -= columns
    return x


def adjoints(f):
    """The adjoint of f: by autograd, derived, and derived and compiled."""
    operators = {
        "autograd": al.linear_operator(f, (side, side), engine="eager"),
        "derived": al.linear_operator(f, (side, side)),
        "derived, compiled": al.linear_operator(f, (side, side)).compile(),
    }
    return {name: operator.H for name, operator in operators.items()}


first, second = adjoints(differences), adjoints(second_differences)
p, q = first["derived"].domain.randn(), second["derived"].domain.randn()
with torch.no_grad():
    races = {
        "finite differences": measure(
            {"by hand": lambda: by_hand(p)} | {k: lambda B=B: B(p) for k, B in first.items()}
        ),
        "weighted second differences": measure({k: lambda B=B: B(q) for k, B in second.items()}),
    }

COLOURS = {"by hand": "#7a7a7a", "autograd": "#d9622b", "derived": "#2f6db3", "derived, compiled": "#3d9950"}
fig, panels = plt.subplots(1, 2, figsize=(10, 2.2))
for axes, (title, times) in zip(panels, races.items(), strict=True):
    bars = axes.barh(list(times), list(times.values()), color=[COLOURS[name] for name in times])
    axes.bar_label(bars, fmt=" %.1f ms")
    axes.set(title=f"adjoint of {title}, {side} × {side}", xticks=[])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
plt.show()
print("engine:", second["derived, compiled"].engine)

# %% [markdown]
# ## The benchmark
#
# `make bench` measures on two threads, against every other way that we know, and draws these figures; the benchmark
# page of the documentation has the numbers behind them. First, single-channel convolutions of growing size: derived
# against PyTorch's own, forward and adjoint.

# %% Curves of times against the size of the image, by adjointlab and by PyTorch, for the adjoint and the forward
Image("../docs/figures/benchmarks-sweep-2d.png", width=820)

# %% [markdown]
# Then the adjoint of several convolutions, by other means and other libraries, in multiples of ours. Each way has its
# own height within a row. Points left of the line are faster than ours: no choice is always the best one.

# %% Dots: times of the adjoint by other ways, in multiples of ours, for eight convolutions
Image("../docs/figures/benchmarks-adjoint.png", width=820)

# %% [markdown]
# ## What this notebook claims

# %%
adjoint_ops = [line for line in account.splitlines() if line.startswith("    t")]
assert len(adjoint_ops) <= 12 + 24, "twelve convolutions, each with at most a preparation of its kernel"
kernels_called = ("= convolution(", "= flipped(", "= polyphase(", "= fft(")
assert sum(any(name in line for name in kernels_called) for line in adjoint_ops) == 12
assert "the derivative does not read the input" in account
assert program.engine == "traced"
assert all(gaps["derived"] <= 4 * gaps["conv_transpose2d"] + 4 * eps for _, gaps, _ in results)
assert any(chosen != "native" for _, _, chosen in results)
assert torch.allclose(B.H(u), torch.func.vjp(c, x)[1](u)[0], atol=1e-4)
assert all(torch.allclose(B(p), by_hand(p), atol=1e-5) for B in first.values())
assert all(torch.allclose(B(q), second["autograd"](q), atol=1e-5) for B in second.values())
assert second["derived, compiled"].engine in ("compiled", "traced")
