"""The step of an affine coupling whose conditioner is a chain of linear maps and elementwise functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_affine.coupling import AffineCoupling
from pyro_affine.network_step import Bend, Link, bend_of, links_of, number, run_network
from pyro_affine.partition import Partition
from pyro_affine.steps import Made, Rows, Wanted

_ELEMENTWISE_SCALES = "pyro_affine.scales"  # the file whose scale maps are all elementwise
_INPUT_ALONE = Wanted(input=True, tensors=False)


def coupling_step(layer: AffineCoupling) -> CouplingStep | None:
    """None for a coupling whose network, or scale map, has no derivative written by hand, or whose sizes do not fit.

    >>> from pyro_affine.conditioners import MLP
    >>> coupling_step(AffineCoupling(torch.tensor([True, False]), MLP(1, 1))).cut
    1
    """
    parts: dict[str, Any] = layer._modules  # past the slow Module.__getattr__
    conditioner, scale = parts.get("conditioner"), parts["scale"]
    links = None if conditioner is None else links_of(conditioner)
    if links is None or type(scale).__module__ != _ELEMENTWISE_SCALES:
        return None
    network: Any = getattr(conditioner, "conditioner", conditioner)  # within BoundedInput
    partition = _of_rows(layer.partition, getattr(network, "partition", None))
    fits = (network.input_dim, network.output_dim) == (layer.partition.num_kept, layer.partition.num_moved)
    return CouplingStep(partition, links, bend_of(scale)) if fits and partition is not None else None


def _of_rows(events: Partition, read: Partition | None) -> Partition | None:
    """How rows are cut: vectors as the events; of images, whose pixels are rows, the channels, kept side by side."""
    if len(events.event_shape) == 1:
        return None if read else events
    if read is None or read.event_shape != events.event_shape or not (events.kept_first or events.kept_last):
        return None
    return Partition(events.mask[:, 0, 0], events.event_shape[:1])


class CouplingStep:
    """y_kept = x_kept, y_moved = x_moved * exp(log_scale) + shift, as ``AffineCoupling``."""

    def __init__(self, partition: Partition, links: list[Link], bend: Bend) -> None:
        self.partition, self.links, self.bend = partition, links, bend
        self.slots = [(link.parameters, name) for link in links for name in ("weight", "bias")]

    @property
    def cut(self) -> int | None:
        partition = self.partition
        return partition.num_moved if partition.kept_last else partition.num_kept if partition.kept_first else None

    def tensors(self) -> list[Tensor]:
        return [holder[name] for holder, name in self.slots]

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        kept, moved = self._split(x)
        both, pull_network = run_network(self.links, tensors, kept, record=record)
        shift, raw = both.split_with_sizes((self.partition.num_moved,) * 2, -1)
        log_scale, known = self.bend.run(raw)
        scale = log_scale.exp()
        y = self._merge(kept, torch.addcmul(shift, moved, scale))
        if not record:
            return Made(y, log_scale)

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            grad_kept, grad = self._split(grad)
            through = grad * scale
            of_scale = through * moved if grad_log_det is None else torch.addcmul(grad_log_det, through, moved)
            of_raw = self.bend.pull(of_scale, known)
            grad_kept, own = pull_network(torch.cat((grad, of_raw), -1), grad_kept, wanted)
            return self._merge(grad_kept, through), own

        def push(score: Any) -> Rows:
            score_kept, score = self._split(score)
            of_shift = score / scale
            of_raw = self.bend.pull(torch.addcmul(number(1.0, moved.dtype, moved.device), moved, score), known)
            score_kept, _ = pull_network(torch.cat((of_shift, of_raw), -1), score_kept, _INPUT_ALONE, sign=-1)
            return self._merge(score_kept, of_shift)

        return Made(y, log_scale, pull, push)

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        kept, moved = self._split(y)
        both, pull_network = run_network(self.links, tensors, kept, record=record)
        shift, raw = both.split_with_sizes((self.partition.num_moved,) * 2, -1)
        log_scale, known = self.bend.run(raw)
        scale = log_scale.exp()
        moved = torch.sub(moved, shift).div_(scale)
        x = self._merge(kept, moved)
        if not record:
            return Made(x, log_scale)

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            grad_kept, grad = self._split(grad)
            through = grad / scale
            of_scale = -grad * moved if grad_log_det is None else torch.addcmul(grad_log_det, grad, moved, value=-1)
            of_raw = self.bend.pull(of_scale, known)
            grad_kept, own = pull_network(torch.cat((-through, of_raw), -1), grad_kept, wanted)
            return self._merge(grad_kept, through), own

        return Made(x, log_scale, pull)

    def _split(self, rows: Any) -> Any:
        """Kept and moved entries."""
        if type(rows) is not tuple:
            return self.partition.split(rows)
        return rows[::-1] if self.partition.kept_last else rows

    def _merge(self, kept: Tensor, moved: Tensor) -> Rows:
        partition = self.partition
        if partition.kept_last:
            return moved, kept
        return (kept, moved) if partition.kept_first else partition.merge(kept, moved)
