"""The linear maps in the networks of couplings, on rows, and how gradients come back through them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

_pull_convolution = torch.ops.aten.convolution_backward.default


class LinearMap(Protocol):
    """A linear map with a weight and a bias, of rows or of what else ``enter`` makes of rows."""

    def enter(self, rows: Tensor) -> Tensor:
        """Rows as the map takes them."""

    def leave(self, made: Tensor) -> Tensor:
        """What the map makes as rows."""

    def run(self, given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What it makes of what it is given."""

    def pull(self, grad: Tensor, given: Tensor, weight: Tensor) -> Tensor:
        """Gradient of what it makes -> of what it was given."""

    def pull_onto(self, onto: Tensor, grad: Tensor, given: Tensor, weight: Tensor, sign: int) -> Tensor:
        """``onto + sign * pull(...)``, as rows."""

    def pull_tensors(self, grad: Tensor, given: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of what it makes -> of bias and weight."""


class Dense:
    """That of ``nn.Linear``."""

    def enter(self, rows: Tensor) -> Tensor:
        return rows

    leave = enter

    def run(self, given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(given, weight, bias)

    def pull(self, grad: Tensor, given: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(grad, weight)

    def pull_onto(self, onto: Tensor, grad: Tensor, given: Tensor, weight: Tensor, sign: int) -> Tensor:
        return torch.addmm(onto, grad, weight, alpha=sign)

    def pull_tensors(self, grad: Tensor, given: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return grad.sum(0), torch.mm(grad.t(), given)


class Convolution:
    """That of ``convolution``, on images with channels last: each pixel is a row. So convolutions are fastest.

    Args:
        size: height and width.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def enter(self, rows: Tensor) -> Tensor:
        return rows.view(-1, *self.size, rows.shape[1]).permute(0, 3, 1, 2)

    def leave(self, made: Tensor) -> Tensor:
        return made.permute(0, 2, 3, 1).reshape(-1, made.shape[1])

    def run(self, given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(given, weight, bias, padding=weight.shape[-1] // 2)

    def pull(self, grad: Tensor, given: Tensor, weight: Tensor) -> Tensor:
        of_given: Tensor = self._pull(grad, given, weight, (True, False, False))[0]
        return of_given

    def pull_onto(self, onto: Tensor, grad: Tensor, given: Tensor, weight: Tensor, sign: int) -> Tensor:
        return torch.add(onto, self.leave(self.pull(grad, given, weight)), alpha=sign)

    def pull_tensors(self, grad: Tensor, given: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        _, of_weight, of_bias = self._pull(grad, given, weight, (False, True, True))
        return of_bias, of_weight

    def _pull(self, grad: Tensor, given: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        padding = [size // 2 for size in weight.shape[2:]]
        plain: Any = [1, 1], padding, [1, 1], False, [0, 0], 1
        return _pull_convolution(grad, given, weight, [weight.shape[0]], *plain, wanted)


_DENSE = Dense()


def map_of(module: nn.Module, size: Size | None = None) -> LinearMap | None:
    """The map of a layer, None for one of another kind.

    Args:
        module: what ``nn.Linear`` or ``convolution`` makes, as it was made.
        size: height and width of the images that it sees; None where it sees vectors.

    >>> map_of(nn.Conv2d(3, 2, 1), Size([4, 5])).enter(torch.ones(40, 3)).shape
    torch.Size([2, 3, 4, 5])
    """
    if type(module) is nn.Linear and size is None:
        return None if module._parameters["bias"] is None else _DENSE
    if type(module) is not nn.Conv2d or size is None or module._parameters["bias"] is None:
        return None
    height, width = module.kernel_size
    keeps_size = height == width and height % 2 and module.padding == (height // 2, width // 2)
    is_plain = (module.stride, module.dilation, module.groups, module.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    return Convolution(size) if keeps_size and is_plain else None
