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

# %% A photograph, its blurred data, the derived adjoint of the data, and the error of ConvTranspose at the border
fig, panels = plt.subplots(1, 4, figsize=(11, 2.9))
show(panels[0], photograph[0, 0], "x, 256 × 256")
show(panels[1], y[0, 0], "y = c x, 128 × 128")
show(panels[2], A.H(y)[0, 0], "cᴴ y, derived")
corner = 40
panels[2].add_patch(plt.Rectangle((-0.5, -0.5), corner, corner, fill=False, color="#d9622b", lw=1.5))
wrong = (guess(y) - A.H(y)).abs()[0, 0]
picture = show(panels[3], wrong[:corner, :corner], "|ConvTranspose y − cᴴ y|, corner", cmap="magma")
fig.colorbar(picture, ax=panels[3], shrink=0.8)
plt.show()

# %% [markdown]
# The guess is right inside and wrong at the border: the reflected pixels were seen twice, so the adjoint must give
# back twice. A gradient descent with it converges to something else.
#
# ## Every padding mode, in one, two and three dimensions
#
# For each case: `ConvTranspose` with the same settings, then with every `output_padding` that it takes, and the
# derived adjoint, which must pass the dot test.

# %%
MODES = ("zeros", "circular", "reflect", "replicate")
STRIDES = (1, 2, 3)


def convolution(dims, mode, stride):
    """A convolution, and its transposes with every output_padding."""
    forward = getattr(nn, f"Conv{dims}d")(1, 2, 3, stride, padding=1, padding_mode=mode, bias=False)
    transpose = getattr(nn, f"ConvTranspose{dims}d")
    backs = [transpose(2, 1, 3, stride, padding=1, output_padding=extra, bias=False) for extra in range(stride)]
    for back in backs:
        back.weight = forward.weight
    return forward.requires_grad_(False), backs


def verdict(B, backs):
    v = B.codomain.randn()
    expected, found = B.H(v), [back(v) for back in backs]
    right = [x.shape == expected.shape and torch.allclose(x, expected, atol=1e-5) for x in found]
    return "right" if right[0] else "found" if any(right) else "wrong"


derived, guessed = {}, {}
for dims, size in ((1, 12), (2, 12), (3, 6)):
    for mode in MODES:
        for stride in STRIDES:
            forward, backs = convolution(dims, mode, stride)
            B = al.linear_operator(forward, (1, 1, *[size] * dims))
            derived[dims, mode, stride] = al.check_adjoint(B, trials=2).passed
            guessed[dims, mode, stride] = verdict(B, backs)

# %% A grid of cases: ConvTranspose is the adjoint for padding with zeros only; the derived adjoint is right in all
LABELS = {"right": "the adjoint", "found": "with the right\noutput_padding", "wrong": "never the adjoint"}
COLOURS = {"right": "#3d9950", "found": "#a9d3b0", "wrong": "#c23b5a"}
fig, panels = plt.subplots(1, 4, figsize=(10, 2.7), sharey=True)
for axes, dims in zip(panels, (1, 2, 3, None), strict=True):
    for i, mode in enumerate(MODES):
        for stride in STRIDES:
            if dims:
                found = guessed[dims, mode, stride]
            else:
                found = "right" if all(derived[d, mode, stride] for d in (1, 2, 3)) else "wrong"
            axes.add_patch(plt.Rectangle((stride - 0.45, i - 0.45), 0.9, 0.9, color=COLOURS[found]))
    axes.set(xlim=(0.4, 3.6), ylim=(3.6, -0.6), title=f"ConvTranspose{dims}d" if dims else "derived, all three")
    axes.set_xticks(STRIDES, [f"stride {stride}" for stride in STRIDES])
    axes.set_yticks(range(len(MODES)), MODES)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=label) for kind, label in LABELS.items()]
panels[3].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()
verdicts = list(guessed.values())
print(f"ConvTranspose is the adjoint in {verdicts.count('right')} of {len(verdicts)} cases,")
print(f"with the right output_padding in {verdicts.count('found')} more; the derived one in {sum(derived.values())}.")

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
assert {mode for (_, mode, _), found in guessed.items() if found != "wrong"} == {"zeros"}
assert al.check_adjoint(U).passed
assert al.check_adjoint(B).passed
assert A.engine == "traced"
assert al.check_linearity(c, photograph).verdict == "proved"
