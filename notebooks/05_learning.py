# %% [markdown]
# # Learning through the adjoint
#
# `A` and `A.H` are differentiable in their argument *and* in the parameters of the wrapped module, to any order:
# each is the derivative of the other. Two uses:
#
# 1. **Calibration**: the kernel of a blur is learned from pairs of images.
# 2. **Unrolling**: a few gradient steps $x \leftarrow x - \tau\,A^H(Ax - y)$ become a network with learned
#    corrections in between.

# %%
import matplotlib.pyplot as plt
import torch
from skimage import data
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
torch.manual_seed(0)


def show(axes, image, title, **options):
    picture = axes.imshow(image.detach(), **options)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture


def psnr(x, truth):
    return float(-10 * (x.clamp(0, 1) - truth).square().mean().log10())


def grey(image):
    image = torch.from_numpy(image / 255).float()
    return image.mean(-1) if image.ndim == 3 else image


# %% [markdown]
# ## A kernel learned from data
#
# The true blur is a short path. All that the learner sees are six sharp patches and their blurred, noisy images.

# %%
time = torch.linspace(0, 1, 300)
path = torch.stack([3 * torch.sin(3 * time), 6 * time - 3])
axis = torch.arange(-5.0, 6.0)
bells = torch.exp(-((axis[:, None] - path[:, None, :]) ** 2) / (2 * 0.55**2))
true_kernel = torch.einsum("it,jt->ij", bells[0], bells[1])
true_kernel /= true_kernel.sum()


def blur(kernel):
    layer = nn.Conv2d(1, 1, 11, padding=5, padding_mode="reflect", bias=False)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer


astronaut, coffee, cat = grey(data.astronaut()), grey(data.coffee()), grey(data.chelsea())
sharp = torch.stack(
    [image[r : r + 64, s : s + 64] for image in (astronaut, coffee, cat) for r, s in ((40, 180), (120, 110))]
)[:, None]
with torch.no_grad():
    blurred = blur(true_kernel)(sharp)
    blurred = blurred + 0.005 * torch.randn_like(blurred)

# %% [markdown]
# The learner is a `Conv2d` that starts with a flat kernel, wrapped as an operator; `LeastSquares` is an ordinary
# module, and `backward()` reaches the weights.

# %%
learner = blur(torch.full((11, 11), 1 / 121))
A_learned = al.linear_operator(learner, sharp)
objective = al.LeastSquares(A_learned, blurred)
optimiser = torch.optim.LBFGS(A_learned.parameters(), max_iter=80, history_size=40, line_search_fn="strong_wolfe")
distances = []


def distance(kernel):
    return float((kernel.detach().reshape(11, 11) - true_kernel).norm() / true_kernel.norm())


def closure():
    optimiser.zero_grad()
    loss = objective(sharp)
    loss.backward()
    distances.append(distance(learner.weight))
    return loss


optimiser.step(closure)
print(f"{len(distances)} evaluations; error of the kernel {distances[0]:.0%} → {distances[-1]:.0%}")

# %% [markdown]
# For a convolution there is a shortcut: its result is linear in the *kernel* as well. So the map from kernel to
# data is an operator itself, with a derived adjoint (a correlation of images with data), and `cgls` solves for the
# kernel.

# %%
padded = nn.functional.pad(sharp, (5, 5, 5, 5), mode="reflect")
K = al.linear_operator(lambda kernel: nn.functional.conv2d(padded, kernel), (1, 1, 11, 11))
solution = al.solvers.cgls(K, blurred, maxiter=80, tol=1e-5)
print(f"cgls: {solution.iterations} steps; error of the kernel {distance(solution.x):.0%}")

# %% A sharp patch, its data, the true kernel, the learned kernel, which looks the same, and its error falling
fig, panels = plt.subplots(1, 5, figsize=(12, 2.6), width_ratios=[1, 1, 1, 1, 1.3])
show(panels[0], sharp[0, 0], "a sharp patch")
show(panels[1], blurred[0, 0], "its data")
show(panels[2], true_kernel, "true kernel", cmap="magma")
show(panels[3], learner.weight[0, 0], f"learned, error {distances[-1]:.0%}", cmap="magma")
panels[4].semilogy(distances)
panels[4].set(title="error of the kernel", xlabel="evaluation of the loss")
plt.show()

# %% [markdown]
# ## The same gradient, through the adjoint
#
# A loss may use `A.H` as well: in an unrolled method it does, many times. The gradient with respect to the weights
# through `A.H` equals the one that plain autograd finds with a second backward pass, and needs no stored
# activations.

# %%
small = blur(true_kernel).double()
B = al.linear_operator(small, (1, 1, 16, 16))
v, target = B.codomain.randn(), B.domain.randn()
loss = (B.H(v) * target).sum() ** 2
(through_adjoint,) = torch.autograd.grad(loss, small.weight)

leaf = B.domain.zeros().requires_grad_()
(adjoint,) = torch.autograd.grad(small(leaf), leaf, v, create_graph=True)  # double backward: what one writes without it
(by_hand,) = torch.autograd.grad((adjoint * target).sum() ** 2, small.weight)
print("relative difference:", float((through_adjoint - by_hand).norm() / by_hand.norm()))

# %% [markdown]
# ## An unrolled network
#
# Five rounds of one gradient step and one small convolutional correction. The operator is fixed; step lengths and
# corrections are learned. `batch_dims=1` lets the batch size vary; the size of an image is part of the space, so
# the same module is wrapped once for training patches and once for the test image, with shared weights.

# %%
forward_model = blur(true_kernel).requires_grad_(False)
sigma = 0.04


class Unrolled(nn.Module):
    """``x ← x − τₖ Aᴴ(A x − y) + Cₖ(x)``, with the operator passed in."""

    def __init__(self, rounds=5, channels=12):
        super().__init__()
        self.steps = nn.Parameter(torch.ones(rounds))
        self.corrections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, channels, 5, padding=2), nn.ReLU(), nn.Conv2d(channels, 1, 5, padding=2))
            for _ in range(rounds)
        )
        for correction in self.corrections:
            nn.init.zeros_(correction[2].weight)
            nn.init.zeros_(correction[2].bias)

    def forward(self, A, y):
        x = y
        for step, correction in zip(self.steps, self.corrections, strict=True):
            x = x - step * A.H(A(x) - y)
            x = x + correction(x)
        return x


patch = 32
A_train = al.linear_operator(forward_model, (1, 1, patch, patch), batch_dims=1)
pool = [image[::2, ::2] for image in (astronaut, coffee, cat, grey(data.rocket()))]


def batch(count, generator):
    patches = []
    for _ in range(count):
        image = pool[int(torch.randint(len(pool), (), generator=generator))]
        r, s = (int(torch.randint(n - patch, (), generator=generator)) for n in image.shape)
        patches.append(image[r : r + patch, s : s + patch])
    x = torch.stack(patches)[:, None]
    return x, A_train(x) + sigma * torch.randn(x.shape, generator=generator)


# %%
STEPS = 600
network = Unrolled()
optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS + 1)
generator = torch.Generator().manual_seed(0)
held_out, held_out_data = batch(64, torch.Generator().manual_seed(1))
losses, scores_held_out = [], []
for step in range(STEPS + 1):
    if step % 20 == 0:
        with torch.no_grad():
            scores_held_out.append(psnr(network(A_train, held_out_data), held_out))
    x, y = batch(8, generator)
    loss = (network(A_train, y) - x).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()
    losses.append(float(loss.detach()))
print(f"{len(losses)} steps; held-out patches: {scores_held_out[0]:.1f} dB → {scores_held_out[-1]:.1f} dB")

# %% [markdown]
# Patches differ: some are nearly constant and easy, others are all edges. So the loss of a batch says little, and
# progress is measured on 64 patches that stay the same: the two curves of the last figure.
#
# The test image is a photograph that no training patch came from. The rivals have the same operator and more steps:
# gradient descent and `cgls`, each stopped where its image is *best*, which only someone who knows the truth can
# do.

# %% The photograph by four methods, details of them, and the quality of held-out patches growing while training
truth = grey(data.camera())[::2, ::2][None, None]
A_test = al.linear_operator(forward_model, truth)
y = A_test(truth) + sigma * torch.randn(truth.shape, generator=generator)
with torch.no_grad():
    learned = network(A_test, y)
    test_objective, norm = al.LeastSquares(A_test, y), al.operator_norm(A_test)
    descent = [y]
    for _ in range(40):
        descent.append(descent[-1] - test_objective.gradient(descent[-1]) / norm**2)
    krylov = [y]
    al.solvers.cgls(A_test, y, x0=y, maxiter=20, tol=0.0, callback=lambda x, info: krylov.append(x))


def best(iterates):
    return max(iterates, key=lambda x: psnr(x, truth))


results = {"data": y, "gradient steps": best(descent), "cgls": best(krylov), "unrolled, 5 rounds": learned}
fig, panels = plt.subplots(2, 5, figsize=(12.5, 5), width_ratios=[1, 1, 1, 1, 1.2])
window = (slice(30, 110), slice(80, 160))
for k, (name, x) in enumerate(results.items()):
    show(panels[0, k], x[0, 0], f"{name}\n{psnr(x, truth):.1f} dB", vmin=0, vmax=1)
    show(panels[1, k], x[0, 0][window], "detail", vmin=0, vmax=1)
show(panels[0, 4], truth[0, 0], "truth", vmin=0, vmax=1)
krylov_held_out = []
with torch.no_grad():
    al.solvers.cgls(
        A_train, held_out_data, x0=held_out_data, maxiter=20, tol=0.0,
        callback=lambda x, info: krylov_held_out.append(psnr(x, held_out)),
    )  # fmt: skip
panels[1, 4].plot(range(0, STEPS + 1, 20), scores_held_out, label="unrolled network")
panels[1, 4].axhline(max(krylov_held_out), color="#d9622b", ls="--", label="cgls at its best")
panels[1, 4].set(title="held-out patches", xlabel="training step", ylabel="PSNR, dB")
panels[1, 4].legend(loc="center right")
plt.show()
for name, x in results.items():
    print(f"{name:20s} {psnr(x, truth):5.2f} dB")

# %% [markdown]
# ## What this notebook claims

# %%
assert distances[-1] < 0.35 < distances[0]
assert distance(solution.x) < 0.35
assert al.check_adjoint(K).passed
assert (through_adjoint - by_hand).norm() < 1e-12 * by_hand.norm()
scores = {name: psnr(x, truth) for name, x in results.items()}
assert scores_held_out[-1] > scores_held_out[0] + 2
assert scores["unrolled, 5 rounds"] > scores["cgls"] + 0.5
assert scores["unrolled, 5 rounds"] > scores["gradient steps"] + 0.5
