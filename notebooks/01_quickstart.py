# %% [markdown]
# # Quickstart: the adjoint of a convolution, without guessing
#
# A question that is asked in every PyTorch forum, in many words:
#
# > My forward model is `c = nn.Conv2d(...)`. I minimise $F(x) = \tfrac12\lVert c\,x - y\rVert^2$, so I need the
# > gradient $c^H(c\,x - y)$. Which `ConvTranspose2d` is $c^H$?
#
# Often there is none. `ConvTranspose` is the adjoint of a convolution with *zero* padding, if its `output_padding`
# is right; with circular, reflecting or replicating borders it is something else. adjointlab derives $c^H$ from `c`
# itself.

# %%
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


# %% [markdown]
# ## Wrap, apply, transpose
#
# A photograph, and a 9×9 blur with reflecting borders that keeps every second pixel.

# %%
photograph = torch.from_numpy(data.camera()[60:316, 130:386] / 255).float()[None, None]

grid = torch.arange(-4.0, 5.0)
bell = torch.softmax(-(grid**2) / (2 * 1.8**2), 0)
c = nn.Conv2d(1, 1, 9, stride=2, padding=4, padding_mode="reflect", bias=False).requires_grad_(False)
c.weight.copy_(torch.outer(bell, bell))

A = al.linear_operator(c, photograph)
y = A(photograph)
A

# %% [markdown]
# `A(x)` is `c(x)`; `A.H(y)` is the adjoint; both are ordinary differentiable PyTorch. The gradient of the question
# is one line, and it is what autograd finds for $F$:

# %%
x = torch.rand_like(photograph)
gradient = A.H(A(x) - y)

leaf = x.clone().requires_grad_()
(by_autograd,) = torch.autograd.grad(0.5 * (c(leaf) - y).square().sum(), leaf)
print("difference from autograd, relative:", float((gradient - by_autograd).norm() / by_autograd.norm()))

# %% [markdown]
# Is it *the* adjoint? The definition decides: $\langle A x, y\rangle = \langle x, A^H y\rangle$ for all $x, y$.
# `check_adjoint` tries random and structured pairs, and compares the gap with what rounding can explain.

# %%
al.check_adjoint(A)

# %% [markdown]
# And the usual guess, `ConvTranspose2d` with the same weights and settings?

# %%
guess = nn.ConvTranspose2d(1, 1, 9, stride=2, padding=4, output_padding=1, bias=False).requires_grad_(False)
guess.weight = c.weight
al.check_adjoint(A, adjoint=guess)

# %%
fig, panels = plt.subplots(1, 4, figsize=(10, 2.9))
show(panels[0], photograph[0, 0], "x, 256 × 256")
show(panels[1], y[0, 0], "y = c x, 128 × 128")
show(panels[2], A.H(y)[0, 0], "cᴴ y, derived")
wrong = (guess(y) - A.H(y)).abs()[0, 0]
picture = show(panels[3], wrong, "|ConvTranspose y − cᴴ y|", cmap="magma")
fig.colorbar(picture, ax=panels[3], shrink=0.8)
plt.show()

# %% [markdown]
# The guess is right inside and wrong at the border: the reflected pixels were seen twice, so the adjoint must give
# back twice. A gradient descent with it converges to something else.
#
# ## Every padding mode, in one, two and three dimensions
#
# For each case: `ConvTranspose` with the same settings, as one would write it without thinking, and the derived
# adjoint, which must pass the dot test.

# %%
MODES = ("zeros", "circular", "reflect", "replicate")
CASES = {
    "stride 1": {},
    "stride 2": {"stride": 2},
    "stride 3": {"stride": 3},
}


def pair(dims, mode, settings):
    forward = getattr(nn, f"Conv{dims}d")(1, 2, 3, padding=1, padding_mode=mode, bias=False, **settings)
    back = getattr(nn, f"ConvTranspose{dims}d")(2, 1, 3, padding=1, bias=False, **settings)
    back.weight = forward.weight
    return forward.requires_grad_(False), back.requires_grad_(False)


def verdict(B, back):
    v = B.codomain.randn()
    found, expected = back(v), B.H(v)
    if found.shape != expected.shape:
        return "shape"
    return "right" if torch.allclose(found, expected, atol=1e-5) else "values"


derived, guessed = {}, {}
for dims, size in ((1, 12), (2, 12), (3, 6)):
    for mode in MODES:
        for name, settings in CASES.items():
            forward, back = pair(dims, mode, settings)
            B = al.linear_operator(forward, (1, 1, *[size] * dims))
            derived[dims, mode, name] = al.check_adjoint(B, trials=2).passed
            guessed[dims, mode, name] = verdict(B, back)

# %%
COLOURS = {"right": "#3d9950", "values": "#d9622b", "shape": "#c23b5a"}
fig, panels = plt.subplots(1, 4, figsize=(10, 2.9), sharey=True, width_ratios=[1, 1, 1, 1.25])
for axes, dims in zip(panels, (1, 2, 3, None), strict=True):
    for i, mode in enumerate(MODES):
        for j, name in enumerate(CASES):
            if dims:
                found = guessed[dims, mode, name]
            else:
                found = "right" if all(derived[d, mode, name] for d in (1, 2, 3)) else "values"
            axes.add_patch(plt.Rectangle((j - 0.45, i - 0.45), 0.9, 0.9, color=COLOURS[found]))
    axes.set(
        xlim=(-0.6, len(CASES) - 0.4),
        ylim=(len(MODES) - 0.4, -0.6),
        title=f"ConvTranspose{dims}d" if dims else "derived, all three",
    )
    axes.set_xticks(range(len(CASES)), CASES, rotation=45, ha="right")
    axes.set_yticks(range(len(MODES)), MODES)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
labels = {"right": "the adjoint", "values": "wrong values", "shape": "wrong shape"}
panels[3].legend(
    handles=[plt.Rectangle((0, 0), 1, 1, color=COLOURS[k], label=v) for k, v in labels.items()],
    loc="center left", bbox_to_anchor=(1.0, 0.5),
)  # fmt: skip
plt.show()
print(f"ConvTranspose is the adjoint in {sum(v == 'right' for v in guessed.values())} of {len(guessed)} cases,")
print(f"the derived adjoint in {sum(derived.values())} of {len(derived)}.")

# %% [markdown]
# The other way round works as well: a `ConvTranspose` may be the *forward* model, and its adjoint is derived in the
# same way.

# %%
up = nn.ConvTranspose3d(2, 3, 3, stride=2, padding=1, output_padding=1, bias=False).requires_grad_(False)
U = al.linear_operator(up, (1, 2, 6, 6, 6))
print(U.codomain, "→", U.H.codomain)
al.check_adjoint(U)

# %% [markdown]
# ## What was derived
#
# `explain()` shows the adjoint as a program. It was traced from the vector-Jacobian product of `c`; the forward
# pass is not in it. That the program does not read `x` at all is also the *proof* that `c` is affine; with $c(0) =
# 0$, linear.

# %%
print(A.explain())

# %% [markdown]
# ## When it is not linear
#
# A bias makes a map affine. The error says so, and what to do; `al.affine_operator` gives both parts.

# %%
biased = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
try:
    al.linear_operator(biased, (1, 1, 32, 32))
except al.NotLinearError as error:
    print(error)

f = al.affine_operator(biased, (1, 1, 32, 32))
z = f.domain.randn()
print("f(z) = A z + b:", torch.allclose(f(z), f.linear(z) + f.offset, atol=1e-6))

# %% [markdown]
# ## Operators compose
#
# Sums, products, multiples, stacks: the adjoint follows by the rules of algebra, and spaces are compared when the
# operator is made, not when it fails.

# %%
mask = (torch.rand(1, 1, 128, 128) < 0.5).float()
M = al.diagonal(mask)
B = al.vstack([M @ A, 0.1 * al.identity(A.domain)])
print(B.domain, "→", B.codomain)
print("largest singular value of A:", round(float(al.operator_norm(A)), 4))
try:
    A @ M
except al.SpaceMismatchError as error:
    print(error)

# %% [markdown]
# ## What this notebook claims

# %%
eps = torch.finfo(torch.float32).eps
assert (gradient - by_autograd).norm() <= 16 * eps * by_autograd.norm()
assert al.check_adjoint(A).passed
assert not al.check_adjoint(A, adjoint=guess).passed
assert all(derived.values())
assert {mode for (_, mode, _), found in guessed.items() if found == "right"} == {"zeros"}
assert al.check_adjoint(U).passed
assert al.check_adjoint(B).passed
assert A.engine == "traced"
assert al.check_linearity(c, photograph).verdict == "proved"
