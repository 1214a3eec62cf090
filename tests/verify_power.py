"""How often the dot-product test sees a bug, and that it never sees one where there is none.

`python -m tests.verify_power` injects realistic bugs into the adjoints of some operators, in several dtypes, counts
what the test detects with its default settings, draws at least 100,000 random pairs for the correct adjoints, and
writes the tables to docs/verification_power.md. tests/verify/test_verify_power.py runs a small part of it.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.verify.checked_map import BrokenError, CheckedMap
from adjointlab.verify.dot_test import DotTest

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64,)
EXPLAINED = (torch.float64, torch.complex64)  # where the diagnosis is asked for as well, once
STUDIED = (torch.float32, torch.float64, torch.complex64, torch.bfloat16)

# ----------------------------------------------------------------------------------------------------------- operators

Maker = Callable[[torch.dtype], tuple[Callable[..., Any], Any]]
OPERATORS: dict[str, tuple[Maker, tuple[torch.dtype, ...]]] = {}


def operator(*dtypes: torch.dtype) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        OPERATORS[make.__name__.replace("_", " ")] = make, dtypes
        return make

    return register


def conv(dtype: torch.dtype, dims: int, *sizes: int, **options: Any) -> nn.Module:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*sizes, bias=False, dtype=dtype, **options)


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@operator(*REAL, *COMPLEX)
def convolution(dtype):
    return conv(dtype, 2, 2, 2, 3, padding=1), zeros(dtype, 3, 2, 12, 12)


@operator(*REAL, *COMPLEX)
def circular_convolution(dtype):
    return conv(dtype, 2, 1, 1, 3, padding=1, padding_mode="circular"), zeros(dtype, 2, 1, 16, 16)


@operator(*REAL, *COMPLEX)
def reflected_convolution(dtype):
    return conv(dtype, 2, 1, 2, 3, padding=1, padding_mode="reflect"), zeros(dtype, 2, 1, 12, 12)


@operator(*REAL, *COMPLEX)
def strided_convolution(dtype):
    return conv(dtype, 1, 2, 3, 5, stride=2, padding=2), zeros(dtype, 2, 2, 40)


@operator(*REAL, *COMPLEX)
def grouped_dilated_convolution(dtype):
    return conv(dtype, 2, 4, 4, 3, dilation=2, groups=2, padding=1), zeros(dtype, 2, 4, 12, 11)


@operator(*REAL, *COMPLEX)
def strided_convolution_of_a_volume(dtype):
    return conv(dtype, 3, 2, 3, 3, stride=2, padding=1), zeros(dtype, 2, 2, 8, 9, 8)


@operator(*REAL)
def average_pooling(dtype):
    return nn.AvgPool2d(2), zeros(dtype, 2, 1, 16, 16)


@operator(*FULL, torch.bfloat16)
def bilinear_resampling(dtype):
    return lambda x: F.interpolate(x, size=(20, 14), mode="bilinear"), zeros(dtype, 2, 1, 12, 12)


@operator(*COMPLEX)
def masked_Fourier_transform(dtype):
    mask = torch.rand(16, 16) < 0.5
    return lambda x: mask * torch.fft.fft2(x), zeros(dtype, 2, 1, 16, 16)


@operator(*COMPLEX)
def sensitivity_maps(dtype):
    maps = torch.randn(1, 4, 12, 12, dtype=dtype)
    return lambda x: torch.fft.fft2(maps * x, norm="ortho"), zeros(dtype, 2, 1, 12, 12)


@operator(*FULL)
def real_Fourier_transform(dtype):
    return lambda x: torch.fft.rfft2(x, norm="ortho"), zeros(dtype, 2, 1, 12, 12)


@operator(*REAL, *COMPLEX)
def matrix(dtype):
    w = torch.randn(60, 50, dtype=dtype)
    return lambda x: x @ w, zeros(dtype, 4, 60)


@operator(*REAL, *COMPLEX)
def finite_differences(dtype):
    return lambda x: (x.diff(dim=-1), x.diff(dim=-2)), zeros(dtype, 2, 1, 16, 16)


@operator(*REAL, *COMPLEX)
def weights(dtype):
    d = torch.rand(2, 1, 16, 16, dtype=dtype) + 0.5
    return lambda x: d * x, zeros(dtype, 2, 1, 16, 16)


@operator(*REAL, *COMPLEX)
def cumulative_sum(dtype):
    return lambda x: x.cumsum(-1), zeros(dtype, 3, 1, 64)


@operator(*REAL, *COMPLEX)
def two_leaves(dtype):
    layer = conv(dtype, 1, 1, 1, 3, padding=1)
    return lambda x, z: {"sum": layer(x) + z, "z": 2 * z}, (zeros(dtype, 2, 1, 32), zeros(dtype, 2, 1, 32))


@operator(*FULL, *COMPLEX)
def cancellation_inside(dtype):
    return lambda x: 1e4 * x - (1e4 * x).mean(-1, keepdim=True) - 0.999e4 * x, zeros(dtype, 2, 1, 64)


# ---------------------------------------------------------------------------------------------------------------- bugs

COMPLEX_ONLY = {"conjugate missing", "only real part", "phase of one entry"}
Adjoint = Callable[[Any], Any]


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda tree: pytree.tree_map(change, tree)


def first(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def apply(tree: Any) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        return pytree.tree_unflatten([change(leaves[0]), *leaves[1:]], spec)

    return apply


def waves(t: Tensor) -> Tensor:
    return torch.arange(t.numel(), dtype=torch.float32).sin().reshape(t.shape).to(t.dtype)


def put(t: Tensor, index: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    t = t.clone()
    t[index] = change(t[index])
    return t


def swapped(t: Tensor) -> Tensor:
    return t[:, [1, 0, *range(2, t.shape[1])]] if t.ndim > 2 and t.shape[1] > 1 else t


def coarse(t: Tensor) -> Tensor:
    """Round to the next coarser dtype: float64 to float32, the others to bfloat16."""
    if t.is_complex():
        return torch.view_as_complex(coarse(torch.view_as_real(t.resolve_conj())))
    return t.to(torch.float32 if t.dtype == torch.float64 else torch.bfloat16).to(t.dtype)


BUGS: dict[str, Callable[[Adjoint, Any], Any]] = {
    "twice too large": lambda B, y: each(lambda t: 2 * t)(B(y)),
    "a fifth too large": lambda B, y: each(lambda t: 1.2 * t)(B(y)),
    "wrong sign": lambda B, y: each(torch.neg)(B(y)),
    "conjugate missing": lambda B, y: each(torch.conj_physical)(B(each(torch.conj_physical)(y))),
    "only real part": lambda B, y: each(lambda t: t.real.to(t.dtype))(B(y)),
    "phase of one entry": lambda B, y: first(lambda t: put(t, (0, ..., 1), lambda v: 1j * v) if t.is_complex() else t)(
        B(y)
    ),
    "shifted by a pixel": lambda B, y: each(lambda t: t.roll(1, -1))(B(y)),
    "kernel not flipped": lambda B, y: each(lambda t: t.flip(-1))(B(each(lambda t: t.flip(-1))(y))),
    "border dropped": lambda B, y: each(lambda t: put(t, (..., [0, -1]), torch.zeros_like))(B(y)),
    "border counted twice": lambda B, y: each(lambda t: put(t, (..., [0, -1]), lambda v: 2 * v))(B(y)),
    "batch mixed": lambda B, y: each(lambda t: t.flip(0))(B(y)),
    "one batch entry doubled": lambda B, y: each(lambda t: put(t, -1, lambda v: 2 * v))(B(y)),
    "channels swapped": lambda B, y: each(swapped)(B(y)),
    "channels of y swapped": lambda B, y: B(each(swapped)(y)),
    "computed in lower precision": lambda B, y: each(coarse)(B(each(coarse)(y))),
    "dims transposed": lambda B, y: each(lambda t: t.mT.contiguous() if t.shape[-1] == t.shape[-2] else t)(B(y)),
    "one leaf dropped": lambda B, y: first(torch.zeros_like)(B(y)),
    "last row of y ignored": lambda B, y: B(each(lambda t: put(t, (..., -1), torch.zeros_like))(y)),
    "an offset added": lambda B, y: each(lambda t: t + t.abs().mean().clamp(min=0.1))(B(y)),
    "not linear": lambda B, y: each(lambda t: t.abs() if not t.is_complex() else t.abs().to(t.dtype))(B(y)),
    "one entry never written": lambda B, y: first(lambda t: put(t, (*(s // 3 for s in t.shape),), torch.zeros_like))(
        B(y)
    ),
    "48 eps too large": lambda B, y: each(lambda t: t + 48 * torch.finfo(t.dtype).eps * t)(B(y)),
    "weights off by 64 eps": lambda B, y: each(lambda t: t + 64 * torch.finfo(t.dtype).eps * waves(t) * t)(B(y)),
    "wrong shape": lambda B, y: each(lambda t: t[..., :-1].contiguous())(B(y)),
    "NaN in a corner": lambda B, y: first(lambda t: put(t, (..., -1), lambda v: v * torch.nan))(B(y)),
}


# --------------------------------------------------------------------------------------------------------------- study


@dataclass(frozen=True)
class Trial:
    """One bug in one adjoint: how large it is in units of eps, and whether the test saw it."""

    operator: str
    bug: str
    dtype: torch.dtype
    size: float
    detected: bool
    diagnosis: str = ""


def build(name: str, dtype: torch.dtype) -> al.LinearOperator:
    make, _ = OPERATORS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        function, domain = make(dtype)
        return al.linear_operator(function, domain)


def built(dtypes: Iterable[torch.dtype], names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.dtype, Any]]:
    for name, (_, possible) in OPERATORS.items():
        if names is None or name in names:
            for dtype in dtypes:
                if dtype in possible:
                    yield name, dtype, build(name, dtype)


def zoo(dtypes: Iterable[torch.dtype]) -> Iterator[tuple[str, torch.dtype, Any]]:
    """Yield the operators of the tests' zoo in every dtype in which they exist: halves are tried."""
    if __package__:
        from tests.operator_zoo import LINEAR
    else:
        from operator_zoo import LINEAR
    for entry in LINEAR:
        for dtype in dtypes:
            half = dtype in {torch.bfloat16, torch.float16} and torch.float32 in entry.dtypes
            if not half and dtype not in entry.dtypes:
                continue
            try:
                A = al.linear_operator(*entry.build(dtype))
            except (RuntimeError, TypeError, ValueError):
                if not half:
                    raise
                continue  # no such op, or none that is linear to the rounding of the dtype
            if A.domain.eps >= torch.finfo(dtype).eps:  # not one that converts to a dtype of its own
                yield entry.name, dtype, A


def size_in_eps(A: al.LinearOperator, wrong: Adjoint) -> float:
    """Return `‖B − Aᴴ‖ / ‖Aᴴ‖` in units of eps, as random y show it; infinite where B is no map to the domain."""
    generator = torch.Generator().manual_seed(99)
    gap = norm = 0.0
    for _ in range(4):
        y = A.codomain.randn(generator)
        right, found = pytree.tree_leaves(A.H(y)), pytree.tree_leaves(wrong(y))
        if any(r.shape != f.shape or not bool(torch.isfinite(f).all()) for r, f in zip(right, found, strict=True)):
            return float("inf")
        gap += sum(float((f - r).to(torch.complex128).abs().square().sum()) for r, f in zip(right, found, strict=True))
        norm += sum(float(r.to(torch.complex128).abs().square().sum()) for r in right)
    return (gap / norm) ** 0.5 / max(A.domain.eps, A.codomain.eps)


def mutants(operators: Iterable[tuple[str, torch.dtype, Any]], seeds: int, *, explain: bool = True) -> Iterator[Trial]:
    """Yield a trial for each bug in each operator that it changes at all, for each seed of the test."""
    for name, dtype, A in operators:
        for kind, make in BUGS.items():
            if kind in COMPLEX_ONLY and not A.domain.is_complex:
                continue

            def wrong(y: Any, make: Any = make, A: Any = A) -> Any:
                return make(A.H, y)

            with torch.no_grad():
                size = size_in_eps(A, wrong)
            if size <= 1.0:
                continue  # this bug is none here: the conjugate of a real operator, the shift of a constant
            for seed in range(seeds):
                if explain and seed == 0 and dtype in EXPLAINED:
                    report = al.check_adjoint(A, wrong)
                    yield Trial(name, kind, dtype, size, not report.passed, report.diagnosis)
                else:  # the same test, without the search for a diagnosis
                    yield Trial(name, kind, dtype, size, not passes(A, wrong, seed))


def passes(A: al.LinearOperator, adjoint: Adjoint, seed: int, trials: int = 5) -> bool:
    sides = CheckedMap(A, A.domain, A.codomain, "A"), CheckedMap(adjoint, A.codomain, A.domain, "B")
    right = None if adjoint is A.H else lambda: CheckedMap(A.H, A.codomain, A.domain, "Aᴴ")
    test = DotTest(*sides, exact=A.is_complex_linear, seed=seed, reference=right)
    with torch.no_grad():
        try:
            test.run(trials)
        except BrokenError:
            return False
    return test.passed


def false_alarms(
    operators: Iterable[tuple[str, torch.dtype, Any]], draws: int, first_seed: int = 0
) -> Iterator[tuple[torch.dtype, int, int]]:
    """Yield dtype, number of random draws and of false alarms, for one correct adjoint after the other."""
    for _, dtype, A in operators:
        alarms = sum(
            not passes(A, A.H, first_seed + seed, trials=min(BLOCK, draws)) for seed in range(-(-draws // BLOCK))
        )
        yield dtype, draws, alarms


# -------------------------------------------------------------------------------------------------------------- report

BLOCK = 250  # draws of one test of a correct adjoint
EVERYWHERE = (torch.float32, torch.float64, torch.complex128, torch.bfloat16, torch.float16)
ROUNDING = 16  # units of eps: a bug below that is within what rounding does to a correct adjoint


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate(trials: list[Trial]) -> str:
    return f"{100 * sum(t.detected for t in trials) / len(trials):.1f} % of {len(trials)}" if trials else "–"


def by(trials: list[Trial], key: Callable[[Trial], Any]) -> dict[Any, list[Trial]]:
    groups: dict[Any, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[key(trial)].append(trial)
    return groups


def grid(trials: list[Trial], key: Callable[[Trial], str], title: str) -> str:
    rows = []
    for label, group in by(trials, key).items():
        columns = by(group, lambda t: t.dtype)
        rows.append([label, *(rate(columns.get(dtype, [])) for dtype in STUDIED)])
    return table([title, *map(name, STUDIED)], rows)


PAGE = """# How much the dot-product test sees

Made by `python -m tests.verify_power` (`make power`) on {date}, Python {python}, torch {torch}, one thread per process.
`al.check_adjoint` was called with its default settings, with seeds 0 to {last_seed}.

## Bugs that are detected

{kinds} kinds of bugs in the adjoints of {operators} operators. A bug's size is `‖B − Aᴴ‖ / ‖Aᴴ‖` in the Frobenius norm,
as random y show it. *Above rounding* is a size of {rounding} eps or more: **{above}** of those were detected.

{sizes}

By kind, above rounding:

{by_bug}

By operator, above rounding:

{by_operator}

Missed above rounding: {missed}.

{named} of the bugs in float64 and complex64 got a diagnosis that names a mistake; the others are reported as
unrecognised, with the place of the largest difference.

## False alarms

**{alarms} in {draws} random draws** of x and y for the correct derived adjoints of the operators above and of the whole
zoo of the tests, in half precision too where the op exists. Each x is compared with its own y and the next one, and
every {block} draws come with scaled draws, impulses and constants. Seeds from {first_seed}.

{false_alarms}
"""


def page(trials: list[Trial], alarms: list[tuple[torch.dtype, int, int]], seeds: int, first_seed: int = 0) -> str:
    above = [t for t in trials if t.size >= ROUNDING]
    bins = [(1, 4), (4, 16), (16, 64), (64, 1024), (1024, float("inf"))]
    sizes = []
    for low, high in bins:
        inside = [t for t in trials if low <= t.size < high or (high == float("inf") and t.size == high)]
        columns = by(inside, lambda t: t.dtype)
        label = f"{low} to {high} eps" if high < float("inf") else f"{low} eps or more"
        sizes.append([label, *(rate(columns.get(dtype, [])) for dtype in STUDIED)])
    totals: dict[torch.dtype, list[int]] = defaultdict(lambda: [0, 0, 0])
    for dtype, draws, count in alarms:
        for k, value in enumerate((1, draws, count)):
            totals[dtype][k] += value
    missed = [f"{t.bug} in {t.operator}, {name(t.dtype)}, {t.size:.0f} eps" for t in above if not t.detected]
    explained = [t for t in trials if t.diagnosis]
    return PAGE.format(
        date=datetime.date.today().isoformat(), python=platform.python_version(), torch=torch.__version__,
        last_seed=seeds - 1, kinds=len(by(trials, lambda t: t.bug)), operators=len(by(trials, lambda t: t.operator)),
        rounding=ROUNDING, above=rate(above), sizes=table(["size", *map(name, STUDIED)], sizes),
        by_bug=grid(above, lambda t: t.bug, "bug"), by_operator=grid(above, lambda t: t.operator, "operator"),
        missed="; ".join(f"{text} ({missed.count(text)} of {seeds})" for text in dict.fromkeys(missed)) or "none",
        named=f"{100 * sum('unrecognised' not in t.diagnosis for t in explained) / len(explained):.0f} %",
        alarms=sum(t[2] for t in totals.values()), draws=f"{sum(t[1] for t in totals.values()):,}",
        block=BLOCK,
        first_seed=first_seed,
        false_alarms=table(
            ["dtype", "operators", "draws", "false alarms"],
            [[name(d), str(t[0]), f"{t[1]:,}", str(t[2])] for d, t in totals.items()],
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="of the test, for each bug")
    parser.add_argument("--draws", type=int, default=100_000, help="in total, of correct adjoints")
    # Draws from 0 decided a tolerance once; those from here have decided nothing.
    parser.add_argument("--first-seed", type=int, default=5000, help="of the draws of correct adjoints")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "verification_power.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    operators = list(built((*STUDIED, torch.float16)))
    correct = [*operators, *zoo(EVERYWHERE)]
    each_one = BLOCK * -(-options.draws // len(correct) // BLOCK)
    alarms = list(false_alarms(correct, each_one, options.first_seed))
    trials = list(mutants([one for one in operators if one[1] in STUDIED], options.seeds))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(page(trials, alarms, options.seeds, options.first_seed), encoding="utf-8")


if __name__ == "__main__":
    main()
