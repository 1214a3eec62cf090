"""Modules whose state changes in every way that an operator follows, each with its own changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GAIN = 1.5  # which a subject reads


class Subject(nn.Module):
    """A linear module, an example of its domain, and what may change in it besides parameters and buffers."""

    shape: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float64, torch.float32)
    batch_dims = 0
    affine = False
    shares = False
    """Whether a deep copy of the operator shares state with it."""
    fixed: tuple[str, ...] = ()
    """Buffers that stay as they are."""
    is_picklable = True
    is_copyable = True
    is_costly = False
    """Whether an operator of it takes long to make."""

    def example(self, dtype: torch.dtype) -> Any:
        return torch.zeros(self.shape, dtype=dtype)

    def is_linear(self) -> bool:
        return True

    def changes(self, rng: random.Random) -> list[Callable[[], str]]:
        """Return changes, each of which says what it did."""
        return []


def number(rng: random.Random) -> float:
    return rng.choice((-2, -1.25, -0.5, 0.5, 1, 1.0, 2, 2.5, True))


class Convolutions(Subject):
    """Two convolutions in a row."""

    shape = (1, 2, 5, 4)
    is_costly = True

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        mode = rng.choice(("zeros", "reflect", "circular"))
        self.first = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False, dtype=dtype)
        self.second = nn.Conv2d(3, 1, (2, 1), stride=2, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def changes(self, rng):
        def hook() -> str:
            handle = self.first.register_forward_hook(_doubled)
            self.first._handles = [*getattr(self.first, "_handles", []), handle]
            return "a hook on first"

        def unhook() -> str:
            for handle in getattr(self.first, "_handles", []):
                handle.remove()
            self.first._handles = []
            return "no hooks on first"

        def replaced() -> str:
            weight = self.second.weight
            self.second = nn.Conv2d(3, 1, (2, 1), stride=2, bias=False, dtype=weight.dtype)
            self.second.weight.requires_grad_(weight.requires_grad)
            return "another second convolution"

        return [hook, unhook, replaced]


def _doubled(module: nn.Module, arguments: Any, result: Tensor) -> Tensor:
    return 2 * result


class Masked(Subject):
    """A mask, boolean or not, and a buffer that is no part of the state."""

    shape = (3, 4)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(3, 4) > 0.4)
        self.register_buffer("gain", torch.randn(4, dtype=dtype), persistent=False)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0) @ self.weight * self.gain + x * self.mask


class Attributes(Subject):
    """Numbers in attributes, in a list, in a dictionary; flags."""

    shape = (2, 5)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.shift, self.flag, self.mode = 2.0, 0, False, "same"
        self.numbers = [1.0, -2.0]
        self.table = {1: 0.5, -1: 2.0}
        self.nested = {"deep": [3.0, {"deeper": 1}]}
        self.weight = nn.Parameter(torch.randn(5, dtype=dtype))
        self.plain = torch.randn(5, dtype=dtype)  # a tensor that is no buffer

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * x * self.weight
        for k, c in enumerate(self.numbers):
            y = y + c * x.roll(k, -1)
        for k, c in self.table.items():
            y = y + c * x.roll(k, 0)
        if self.flag:
            y = y.flip(-1)
        if self.mode == "cumulative":
            y = y.cumsum(-1)
        y = y + self.nested["deep"][0] * self.nested["deep"][1]["deeper"] * x + self.plain.to(x.dtype) * x
        return y + self.shift

    def is_linear(self) -> bool:
        return self.shift == 0

    def changes(self, rng):
        def scale() -> str:
            self.scale = number(rng)
            return f"scale = {self.scale!r}"

        def shift() -> str:
            self.shift = rng.choice((0, 0.0, 0.5)) if self.shift == 0 else 0
            return f"shift = {self.shift!r}"

        def flag() -> str:
            self.flag = not self.flag
            return f"flag = {self.flag}"

        def mode() -> str:
            self.mode = rng.choice(("same", "cumulative", "other"))
            return f"mode = {self.mode!r}"

        def element() -> str:
            if not self.numbers or (len(self.numbers) < 4 and rng.random() < 0.3):
                self.numbers.append(number(rng))
            elif rng.random() < 0.3:
                self.numbers.pop()
            elif rng.random() < 0.3:
                self.numbers = [*self.numbers]
                self.numbers.reverse()
            else:
                self.numbers[rng.randrange(len(self.numbers))] = number(rng)
            return f"numbers = {self.numbers}"

        def entry() -> str:
            if len(self.table) > 1 and rng.random() < 0.3:
                self.table.pop(rng.choice(list(self.table)))
            else:
                self.table[rng.choice((-1, 0, 1, 2))] = number(rng)
            return f"table = {self.table}"

        def deep() -> str:
            if rng.random() < 0.5:
                self.nested["deep"][1]["deeper"] = number(rng)
            else:
                self.nested["deep"][0] = number(rng)
            return f"nested = {self.nested}"

        def tensor() -> str:
            new = torch.randn_like(self.plain)
            if rng.random() < 0.5:
                self.plain = new
                return "plain tensor replaced"
            self.plain.copy_(new)
            return "plain tensor in place"

        return [scale, shift, flag, mode, element, entry, deep, tensor]


class Layers(Subject):
    """A list and a dictionary of submodules."""

    shape = (2, 3)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False, dtype=dtype) for _ in range(2)])
        self.named = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False, dtype=dtype), "b": nn.Identity()})
        self.weights = nn.ParameterList([torch.randn(3, dtype=dtype)])
        self.which = "a"

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = y + layer(y)
        for weight in self.weights:
            y = y * weight
        return y - self.named[self.which](x)

    def changes(self, rng):
        def fresh() -> nn.Module:
            return nn.Linear(3, 3, bias=False, dtype=self.weights[0].dtype)

        def append() -> str:
            if len(self.layers) < 3:
                self.layers.append(fresh())
            return f"{len(self.layers)} layers"

        def pop() -> str:
            if len(self.layers) > 0:
                del self.layers[rng.randrange(len(self.layers))]
            return f"{len(self.layers)} layers"

        def replace() -> str:
            if len(self.layers) > 0:
                self.layers[rng.randrange(len(self.layers))] = rng.choice((fresh, nn.Identity))()
            return "a layer replaced"

        def which() -> str:
            self.which = "b" if self.which == "a" else "a"
            return f"which = {self.which}"

        def swap() -> str:
            self.named["a"], self.named["b"] = self.named["b"], self.named["a"]
            return "named layers exchanged"

        return [append, pop, replace, which, swap]


class Coils(Subject):
    """A Fourier transform of images weighted with coil sensitivities, sampled by a mask."""

    shape = (4, 3)
    dtypes = (torch.complex128,)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("maps", torch.randn(2, 4, 3, dtype=dtype))
        self.register_buffer("mask", (torch.rand(4, 3) > 0.3).to(dtype.to_real()))
        self.phase = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.norm: str | None = "ortho"

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * torch.fft.fft2(self.maps * (self.phase * x), norm=self.norm)

    def changes(self, rng):
        def norm() -> str:
            self.norm = rng.choice(("ortho", None, "forward"))
            return f"norm = {self.norm!r}"

        return [norm]


class Affine(Subject):
    """A layer with a bias."""

    shape = (2, 4)
    affine = True

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=dtype)
        self.level = 0.5
        self.square = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.level
        return y * y if self.square else y

    def is_linear(self) -> bool:
        return not self.square

    def changes(self, rng):
        def level() -> str:
            self.level = number(rng)
            return f"level = {self.level!r}"

        def square() -> str:
            self.square = not self.square
            return f"square = {self.square}"

        return [level, level, square]


class Batched(Subject):
    """Images, as many as there are."""

    shape = (2, 1, 6)
    batch_dims = 1

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Conv1d(
            1, 2, 3, padding=1, padding_mode=rng.choice(("zeros", "reflect")), bias=False, dtype=dtype
        )
        self.scale = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)

    def changes(self, rng):
        def scale() -> str:
            self.scale = number(rng)
            return f"scale = {self.scale!r}"

        return [scale]


class BatchedAffine(Batched):
    """The same with an offset, and two arguments."""

    affine = True
    is_costly = True

    def example(self, dtype: torch.dtype) -> Any:
        return torch.zeros(2, 1, 6, dtype=dtype), torch.zeros(2, 3, dtype=dtype)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__(rng, dtype)
        self.bias = nn.Parameter(torch.randn(2, 1, dtype=dtype))
        self.register_buffer("weight", torch.randn(3, 6, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x) + self.bias - (z @ self.weight)[:, None]


class Dropped(Subject):
    """Dropout, which is linear in evaluation mode only; on so many numbers that no two masks are the same."""

    shape = (64,)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.layer = nn.Linear(64, 4, bias=False, dtype=dtype)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x))

    def is_linear(self) -> bool:
        return not self.drop.training

    def changes(self, rng):
        def mode() -> str:
            self.train(not self.training)
            return f"training = {self.training}"

        return [mode, mode]


class Normed(Subject):
    """Batch norm with statistics that stay, an affine map."""

    shape = (3, 2, 4)
    affine = True
    fixed = ("running_var", "num_batches_tracked")

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=dtype)
        self.norm.running_mean.normal_()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Shifted(Subject):
    """Linear for some values of a buffer only."""

    shape = (4,)
    fixed = ("shift",)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=dtype))
        self.register_buffer("shift", torch.zeros(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x + self.shift

    def is_linear(self) -> bool:
        return not bool(self.shift.any())

    def changes(self, rng):
        def shift() -> str:
            value = 0.0 if self.shift.any() else rng.choice((0.0, 1.0))
            if rng.random() < 0.5:
                tensor = rng.choice((self.shift, self.shift.data))  # the second leaves no version behind
                tensor.fill_(value)
                return f"shift = {value} in place"
            self.shift = torch.full_like(self.shift, value)
            return f"shift = {value}, another tensor"

        return [shift]


class Branching(Subject):
    """A branch on the value of a buffer, which cannot be traced; and attributes besides."""

    shape = (3,)
    fixed = ("sign",)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("sign", torch.tensor(1.0, dtype=dtype))
        self.weight = nn.Parameter(torch.randn(3, dtype=dtype))
        self.scale, self.numbers, self.table = 2.0, [1.0], {"a": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x if self.sign > 0 else self.scale * x.flip(0)
        return y + self.numbers[0] * self.table["a"] * x

    def changes(self, rng):
        def sign() -> str:
            self.sign.neg_()
            return f"sign = {self.sign.item()}"

        def scale() -> str:
            self.scale = number(rng)
            return f"scale = {self.scale!r}"

        def element() -> str:
            self.numbers[0] = number(rng)
            return f"numbers = {self.numbers}"

        def entry() -> str:
            self.table["a"] = number(rng)
            return f"table = {self.table}"

        return [sign, sign, scale, element, entry]


class Sparse(Subject):
    """A sparse matrix in a buffer, in one of three layouts."""

    shape = (4, 2)
    dtypes = (torch.float64,)
    fixed = ("matrix",)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout = rng.choice((torch.sparse_coo, torch.sparse_csr, torch.sparse_csc))
        self.is_copyable = self.layout is torch.sparse_coo  # torch copies no others
        self.register_buffer("matrix", self.drawn(dtype))
        self.scale = 1.0

    def drawn(self, dtype: torch.dtype) -> Tensor:
        dense = torch.randn(3, 4, dtype=dtype) * (torch.rand(3, 4) > 0.4)
        return dense.to_sparse(layout=self.layout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.matrix @ x)

    def changes(self, rng):
        def replaced() -> str:
            self.matrix = self.drawn(self.matrix.dtype)
            return "another matrix"

        def in_place() -> str:
            values = self.matrix._values() if self.layout is torch.sparse_coo else self.matrix.values()
            values[rng.randrange(len(values)) :] *= -0.5
            return "matrix in place"

        def scale() -> str:
            self.scale = number(rng)
            return f"scale = {self.scale!r}"

        return [replaced, in_place, scale]


class Gathered(Subject):
    """A gather with weights, and a sample on a grid."""

    shape = (1, 1, 4, 5)
    dtypes = (torch.float64, torch.float32)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(6, 3, dtype=dtype))
        self.register_buffer("grid", torch.rand(1, 3, 4, 2, dtype=dtype) * 2.4 - 1.2)
        self.places = torch.randint(0, 12, (6, 3))

    def forward(self, x: Tensor) -> Tensor:
        sampled = nn.functional.grid_sample(x, self.grid, align_corners=False)
        return (sampled.reshape(-1)[self.places] * self.weights).sum(-1)

    def changes(self, rng):
        def places() -> str:
            self.places[rng.randrange(len(self.places)), rng.randrange(3)] = rng.randrange(12)
            return "a place"

        def replaced() -> str:
            self.places = torch.randint(0, 12, (rng.choice((6, 1)), 3))
            return "other places"

        def grid() -> str:
            self.grid.data[..., rng.randrange(2)].mul_(-0.9)
            return "grid through .data"

        def weights() -> str:
            self.weights.detach().numpy()[rng.randrange(6)] = rng.random()
            return "weights through NumPy"

        return [places, replaced, grid, weights]


class Product(torch.autograd.Function):
    """`c x`, with its backward."""

    @staticmethod
    def forward(x: Tensor, c: Tensor) -> Tensor:
        return c * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        x, c = ctx.saved_tensors
        return c.conj() * v, x.conj() * v


class Own(Subject):
    """A function with a backward of its own."""

    shape = (5,)
    dtypes = (torch.float64, torch.complex128)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight).cumsum(0)


class Global(Subject):
    """Reads a global and attributes of its class."""

    shape = (4,)
    shares = True
    gain = 2.0
    gains = (1.0, 2.0)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return GAIN * x + self.gain * self.weight * x.flip(0) + self.gains[0] * x.cumsum(0)

    def changes(self, rng):
        def world() -> str:
            globals()["GAIN"] = number(rng)
            return f"GAIN = {GAIN!r}"

        def of_class() -> str:
            Global.gain = number(rng)
            return f"Global.gain = {Global.gain!r}"

        def pair() -> str:
            Global.gains = (number(rng), 1.0)
            return f"Global.gains = {Global.gains!r}"

        return [world, of_class, pair]


class Circular(Subject):
    """A large circular kernel, as Fourier transforms compute fast."""

    shape = (1, 1, 40, 40)
    is_costly = True
    dtypes = (torch.float64,)

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 17, padding=8, padding_mode="circular", bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Parametrized(Subject):
    """A weight that is computed from others."""

    shape = (1, 2, 5)
    is_picklable = False  # torch refuses
    is_costly = True

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Closure:
    """A function that closes over a parameter, a tensor, a number and a list."""

    dtypes = (torch.float64, torch.complex128)
    batch_dims, affine, shares, fixed, is_costly = 0, False, True, (), False

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        parameter, tensor, scale, numbers = (
            nn.Parameter(torch.randn(4, dtype=dtype)),
            torch.randn(4, dtype=dtype),
            2.0,
            [1.0],
        )

        def function(x: Tensor) -> Tensor:
            return scale * parameter * x + (tensor * x).flip(0) + numbers[0] * x

        def change() -> str:
            nonlocal tensor, scale
            what = rng.choice(("number", "list", "tensor", "tensor in place", "parameter in place", "data"))
            if what == "number":
                scale = number(rng)
            elif what == "list":
                numbers[0] = number(rng)
            elif what == "tensor":
                tensor = torch.randn_like(tensor)
            elif what == "tensor in place":
                tensor.mul_(-1.5)
            elif what == "data":
                parameter.data = torch.randn_like(parameter.data)
            else:
                with torch.no_grad():
                    parameter.copy_(torch.randn_like(parameter))
            return f"closure: {what}"

        def toggled() -> str:
            parameter.requires_grad_(not parameter.requires_grad)
            return f"closure: requires_grad = {parameter.requires_grad}"

        self.function, self._changes, self._parameter = function, [change, change, change, toggled], parameter

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def example(self, dtype: torch.dtype) -> Any:
        return torch.zeros(4, dtype=dtype)

    def is_linear(self) -> bool:
        return True

    def parameters(self) -> list[Tensor]:
        return [self._parameter]

    def changes(self, rng: random.Random) -> list[Callable[[], str]]:
        return self._changes


SUBJECTS: list[Any] = [
    Convolutions, Masked, Attributes, Layers, Coils, Affine, Batched, BatchedAffine, Dropped, Normed, Shifted,
    Branching, Sparse, Gathered, Own, Global, Circular, Parametrized, Closure,
]  # fmt: skip
