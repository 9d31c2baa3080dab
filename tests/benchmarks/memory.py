"""Peak activation memory and time of a training step, by what a chain keeps for the backward pass.

Run ``python tests/benchmarks/memory.py``. One step is the mean negative log-density of a batch and its gradients.
Peak: the most bytes of tensors alive at once during the step, counted at each operation, without parameters, the
batch, and the gradients of parameters, which grow with the number of layers in any case. Time: median of interleaved
steps, not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_affine import ActNorm, AffineCoupling, ComposeFlow, ConvNet, invertible_conv1x1, real_nvp
from pyro_affine.coupling import default_scale
from pyro_affine.masks import channel_mask

WAYS = ("full", "checkpoint", "invertible")


class LiveBytes(TorchDispatchMode):
    """Records when the storage of each tensor appears and goes.

    Args:
        without: tensors that were there before, whose views do not count.

    >>> with LiveBytes() as live:
    ...     for _ in range(3):
    ...         made = torch.ones(10) + 1
    >>> live.peak()  # the old sum, the ones, and the new sum
    120
    """

    def __init__(self, without=()):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in without}
        self._alive = {}  # storage: (weak reference, bytes)
        self._events = []  # (storage, bytes that appear, or go if negative)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for key, (reference, size) in list(self._alive.items()):
            if reference.expired():
                self._events.append((key, -size))
                del self._alive[key]
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive and storage._cdata not in self._known:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self._events.append((storage._cdata, storage.nbytes()))
        return made

    def peak(self, without=()):
        """Most bytes alive at once, not counting the storages of some tensors that are still alive."""
        ignored = {tensor.untyped_storage()._cdata for tensor in without}
        last = {}
        for index, (key, size) in enumerate(self._events):
            if size > 0:
                last[key] = index  # an address may have been another tensor's before
        now = most = 0
        for index, (key, size) in enumerate(self._events):
            if key not in ignored or index < last[key]:
                now += size
                most = max(most, now)
        return most


def peak_bytes(flow: nn.Module, loss) -> int:
    """Peak of ``loss()`` and its backward pass, without parameters, buffers and their gradients."""
    flow.zero_grad()
    with LiveBytes(without=[*flow.parameters(), *flow.buffers()]) as live:
        loss().backward()
    return live.peak(without=[p.grad for p in flow.parameters() if p.grad is not None])


def set_memory(flow: nn.Module, memory: str) -> nn.Module:
    """Let all chains in a flow keep what ``memory`` says."""
    for module in flow.modules():
        if isinstance(module, ComposeFlow):
            module.memory = memory
    return flow


def vectors(num_layers: int) -> tuple[nn.Module, torch.Tensor]:
    """RealNVP, 512 rows of 64 entries."""
    return real_nvp(64, num_layers=num_layers, hidden_dims=(64, 64)), torch.randn(512, 64)


def images(num_layers: int) -> tuple[nn.Module, torch.Tensor]:
    """Steps of Glow, 16 images (12, 8, 8)."""
    shape, mask = (12, 8, 8), channel_mask(12)
    parts = []
    for _ in range(num_layers):
        network = AffineCoupling(mask, ConvNet(mask, shape, 32), default_scale(num_layers), event_shape=shape)
        parts += [network, invertible_conv1x1(shape), ActNorm(shape)]
    return ComposeFlow(parts), torch.randn(16, *shape)


def step_time(loss) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    loss().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each row")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'flow':40s} {'memory':12s} {'peak, 8 layers':>15s} {'64 layers':>10s} {'ratio':>6s} {'step, 64 layers':>16s}"
    )
    for make in (vectors, images):
        peaks = {memory: [] for memory in WAYS}
        times = {memory: [] for memory in WAYS}
        for num_layers in (8, 64):
            flow, data = make(num_layers)
            for parameter in flow.parameters():
                parameter.data.add_(0.02 * torch.randn_like(parameter))  # off the identity

            def loss(flow=flow, data=data):
                x, log_det = flow._backward(data)
                return (0.5 * x.square().flatten(1).sum(-1) + log_det).mean()

            for memory in WAYS:
                peaks[memory].append(peak_bytes(set_memory(flow, memory), loss) / 2**20)
        for _ in range(repeats):
            for memory in WAYS:
                set_memory(flow, memory)
                times[memory].append(step_time(loss))
        for memory in WAYS:
            few, many = peaks[memory]
            seconds = statistics.median(times[memory])
            slower = seconds / statistics.median(times["full"])
            print(
                f"{make.__doc__.rstrip('.'):40s} {memory:12s} {few:11.1f} MiB {many:6.1f} MiB {many / few:6.2f} "
                f"{1e3 * seconds:8.0f} ms, {slower:.2f}x"
            )


if __name__ == "__main__":
    main()
