# %% [markdown]
# # Verification: trust, but check
#
# Two questions can be asked of any pair of functions: is the one *linear*, and is the other its *adjoint*?
# adjointlab answers both, in words, about its own operators and about yours.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import adjointlab as al

plt.style.use("adjointlab.mplstyle")
_ = torch.manual_seed(0)

# %% [markdown]
# ## The dot test
#
# $\langle A x, y\rangle = \langle x, B y\rangle$ must hold for all $x, y$; if $B \ne A^H$, it fails for almost all.
# The question is only what rounding explains. `check_adjoint` scales the gap by the norms and derives the tolerance
# from the dtype; there is no number to tune.

# %%
c = nn.Conv2d(2, 3, (3, 5), stride=2, padding=(1, 2), bias=False).requires_grad_(False)
A = al.linear_operator(c, (4, 2, 24, 20))
al.check_adjoint(A)

# %% [markdown]
# ## Broken adjoints, diagnosed
#
# Mistakes that people make, on purpose. Where the test fails, the usual mistakes are tried on the right adjoint until
# one of them gives the wrong one.

# %%


def transposed(**changes):
    options = {"stride": 2, "padding": (1, 2), "output_padding": 1, **changes}
    flip = options.pop("flip", False)
    weight = c.weight.flip(2, 3) if flip else c.weight
    return lambda y: F.conv_transpose2d(y, weight, **options)


def last_row_lost(y):
    x = A.H(y).clone()
    x[..., -1, :] = 0
    return x


def third_entry_wrong(y):
    x = A.H(y).clone()
    x[2] = -x[2]
    return x


BROKEN = {
    "right": A.H,
    "sign": lambda y: -A.H(y),
    "factor 2": lambda y: 2 * A.H(y),
    "kernel flipped": transposed(flip=True),
    "wrong output_padding": transposed(output_padding=0),
    "rolled by one": lambda y: A.H(y).roll(1, -1),
    "last row lost": last_row_lost,
    "one batch entry": third_entry_wrong,
    "detached": lambda y: torch.zeros_like(A.H(y)),
    "not linear": lambda y: A.H(y).abs(),
}
reports = {name: al.check_adjoint(A, adjoint=B) for name, B in BROKEN.items()}
for name, report in reports.items():
    print(f"{name:22s} {'passed' if report.passed else 'FAILED'}  {report.diagnosis}")

# %% [markdown]
# A report is a frozen value: it prints, shows itself in a notebook with a picture of what differs, and serialises
# to JSON for a log.

# %%
reports["last row lost"]

# %% [markdown]
# How wrong is wrong? Each error as a multiple of its tolerance, on a logarithmic scale (a wrong shape has no error):

# %% Bars: the error of the right adjoint is below its tolerance, those of eight wrong ones far above
names = [name for name, report in reports.items() if report.error == report.error]  # not NaN: there were numbers
ratios = [max(reports[name].error / reports[name].tolerance, 1e-2) for name in names]
fig, axes = plt.subplots(figsize=(8, 3.4))
colours = ["#3d9950" if reports[name].passed else "#c23b5a" for name in names]
axes.barh(names, ratios, color=colours, left=0)
axes.axvline(1, color="black", lw=1)
axes.set(xscale="log", xlabel="error / tolerance", title="everything right of the line fails")
axes.invert_yaxis()
axes.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# ## Why not a fixed tolerance?
#
# Let $l = \langle A x, y\rangle$ and $r = \langle x, B y\rangle$. A common test is `abs(l - r) < 1e-3 * abs(l)`. Draw
# 200 random pairs for the right adjoint, and for one with a mistake in a single row. Then compare the gap that this
# test sees with the gap divided by the norms. A good limit has all blue draws at its left and all orange ones at its
# right.

# %% Histograms: a fixed limit divides the draws with a mistake; the limit from the dtype separates right from wrong
left, scaled = {"right": [], "one row": []}, {"right": [], "one row": []}


def one_row(y):
    x = A.H(y).clone()
    x[0, 0, 7] *= 1.02
    return x


for name, B in {"right": A.H, "one row": one_row}.items():
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        x, y = A.domain.randn(generator), A.codomain.randn(generator)
        forward, backward = A(x), B(y)
        one, other = A.codomain.inner(forward, y), A.domain.inner(x, backward)
        left[name].append(float(abs(one - other) / max(abs(one), abs(other))))
        scaled[name].append(float(abs(one - other) / (A.codomain.norm(forward) * A.codomain.norm(y))))

fig, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for axes, values, title, scale, line, limit in (
    (panels[0], left, "a fixed limit", "the larger of |l| and |r|", 1e-3, "limit 0.001"),
    (panels[1], scaled, "a limit from the dtype", "‖Ax‖ ‖y‖", 16 * A.domain.eps, "limit 16 eps"),
):
    for name, sample in values.items():
        axes.hist(torch.tensor(sample).clamp_min(1e-11), bins=torch.logspace(-11, 0, 67), alpha=0.7, label=name)
    axes.axvline(line, color="black", lw=1)
    axes.annotate(f" {limit}", (line, 0.95), xycoords=("data", "axes fraction"))
    axes.set(title=title, xscale="log", xlabel=f"gap |l − r|, divided by {scale}")
panels[0].set(ylabel="number of draws, of 200")
panels[0].legend(["right adjoint", "one row 2 % too large"], loc="upper left")
plt.show()
missed = sum(value < 1e-3 for value in left["one row"]) / 200
caught = sum(value > 16 * A.domain.eps for value in scaled["one row"]) / 200
print(f"a row wrong by 2 %: the fixed limit misses {missed:.0%} of single draws, the scaled one catches {caught:.0%}")

# %% [markdown]
# ## As an assertion
#
# In tests, `al.assert_adjoint` raises with the whole report. There is a pytest plugin as well; see the how-to guide.

# %%
try:
    al.assert_adjoint(torch.fft.fft, torch.fft.ifft, domain=torch.zeros(64, dtype=torch.complex64))
except al.AdjointMismatchError as error:
    print(error)

# %% [markdown]
# ## Linearity: proved, supported, refuted
#
# The derivative of a map is traced as a program. If the program does not read the input, the derivative is constant
# and the map is affine: that is a *proof*, as far as autograd tells the truth about derivatives, and a dot test
# looks for what autograd may hide. Where there is no such program the evidence is numerical: *supported*. A
# counterexample *refutes*.

# %%


class Scaled(torch.autograd.Function):
    """Twice the input, with a backward that is wrong."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, v):
        return 3 * v


MAPS = {
    "circular convolution": nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False),
    "FFT and mask": lambda x: torch.fft.rfft(x)[..., :5],
    "average pooling": nn.AvgPool1d(2),
    "batch norm, eval, no bias": nn.BatchNorm1d(1, affine=False).eval(),
    "branch on x": lambda x: x if x.sum() > 0 else 1.0 * x,
    "convolution with bias": nn.Conv1d(1, 1, 3),
    "ReLU": nn.ReLU(),
    "softmax": nn.Softmax(-1),
    "x · sum(x), by .item()": lambda x: x * x.sum().item(),
    "dropout, train": nn.Dropout(0.5),
    "rounding": torch.floor,
    "wrong custom backward": Scaled.apply,
    "detached": lambda x: 2 * x.detach(),
}
verdicts = {}
for name, f in MAPS.items():
    verdicts[name] = report = al.check_linearity(f, (1, 1, 16))
    reason = report.evidence[0 if report.differentiable else -1]
    if report.counterexample:
        reason = f"not {report.counterexample.law.rstrip(',')}"
    print(f"{name:26s} {report.verdict:9s}  {reason}")

# %% [markdown]
# Two of them are linear and *still* have no adjoint here: for the wrong backward and the detached map, autograd's
# derivative is not the map. `linear_operator` refuses them, rather than hand out a wrong adjoint:

# %%
for name in ("wrong custom backward", "detached", "ReLU", "dropout, train"):
    try:
        al.linear_operator(MAPS[name], (1, 1, 16))
    except (al.NotLinearError, al.NotDifferentiableError) as error:
        print(f"{type(error).__name__}: {error}\n")

# %% [markdown]
# The full report on one of them:

# %%
verdicts["ReLU"]

# %% [markdown]
# ## What this notebook claims

# %%
assert reports["right"].passed
assert reports["right"].diagnosis == ""
assert not any(report.passed for name, report in reports.items() if name != "right")
assert all(report.diagnosis for name, report in reports.items() if name != "right")
assert "sign" in reports["sign"].diagnosis
assert "2.000 × too large" in reports["factor 2"].diagnosis
assert missed > 0.2
assert caught > 0.9
assert all(value <= 16 * A.domain.eps for value in scaled["right"])
for name in list(MAPS)[:4]:
    assert verdicts[name].verdict == "proved", name
assert verdicts["branch on x"].verdict == "supported"
for name in list(MAPS)[5:11]:
    assert verdicts[name].verdict == "refuted", name
assert verdicts["convolution with bias"].is_affine
assert not verdicts["wrong custom backward"].differentiable
assert not verdicts["detached"].differentiable
