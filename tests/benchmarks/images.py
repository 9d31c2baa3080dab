"""Glow of ours, of normflows' blocks and of nflows' transforms on scikit-learn's digits, at the same budget in one run.

Run ``python tests/benchmarks/images.py``. All have two levels of four steps, networks of 3x3, 1x1 and 3x3 convolutions
with 32 hidden channels (SiLU in ours, ReLU in theirs: the defaults), the same logit, minibatches, noise and optimiser.
They are trained in turn, a step of each, until each has used its budget of CPU seconds, so that whatever else the
machine does meets all alike. The learning rate falls by a cosine over the budget; the weights that score best on
held-out images, looked at ten times, are tested.

Peak: the most bytes of tensors alive at once during a training step, without parameters, their gradients and the
batch, as in ``memory.py``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import time

import torch
from memory import LiveBytes
from sklearn.datasets import load_digits
from torch import nn

from pyro_affine import LogitImages, NormalizingFlow, bits_per_dim, dequantize, glow, initialize_actnorms

LEVELS, SHAPE = 17, (1, 8, 8)
NUM_LEVELS, NUM_STEPS, HIDDEN = 2, 4, 32
BATCH_SIZE, NUM_LOOKS, WARMUP = 128, 10, 50


class WithLogit(nn.Module):
    """The density of images in [0, 1] from that of their logits."""

    def __init__(self, log_prob_of_logits):
        super().__init__()
        self.inner, self.logit = log_prob_of_logits, LogitImages(0.05, SHAPE)

    def log_prob(self, images):
        logits, log_det = self.logit._backward(images)
        return self.inner(logits) - log_det


class LogProb(nn.Module):
    """A Module whose call is the ``log_prob`` of another."""

    def __init__(self, flow, *arguments):
        super().__init__()
        self.flow, self.arguments = flow, arguments

    def forward(self, images):
        return self.flow.log_prob(images, *self.arguments)


def ours(**options):
    return NormalizingFlow(glow(SHAPE, NUM_LEVELS, NUM_STEPS, HIDDEN, **options), SHAPE)


def normflows_glow():
    """As in the example of its documentation."""
    import normflows as nf

    bases, merges, flows = [], [], []
    for index in range(NUM_LEVELS):
        channels, size = 2 ** (NUM_LEVELS + 1 - index), SHAPE[1] // 2 ** (NUM_LEVELS - index)
        blocks = [nf.flows.GlowBlock(channels, HIDDEN, split_mode="channel", scale=True) for _ in range(NUM_STEPS)]
        flows.append([*blocks, nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if index else []
        bases.append(nf.distributions.DiagGaussian((channels // 2 if index else channels, size, size)))
    return WithLogit(LogProb(nf.MultiscaleFlow(bases, flows, merges, class_cond=False), None))


class PlainConvNet(nn.Sequential):
    """The network of Glow, called as nflows does."""

    def __init__(self, num_inputs, num_outputs):
        last = nn.Conv2d(HIDDEN, num_outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first, middle = nn.Conv2d(num_inputs, HIDDEN, 3, padding=1), nn.Conv2d(HIDDEN, HIDDEN, 1)
        super().__init__(first, nn.ReLU(), middle, nn.ReLU(), last)

    def forward(self, image, context=None):
        return super().forward(image)


def nflows_glow():
    from nflows import transforms as tf
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow

    levels, shape = tf.MultiscaleCompositeTransform(NUM_LEVELS), SHAPE
    for _ in range(NUM_LEVELS):
        squeeze = tf.SqueezeTransform()
        shape = squeeze.get_output_shape(*shape)
        mask, steps = torch.arange(shape[0]) % 2, []
        for _ in range(NUM_STEPS):
            coupling = tf.AffineCouplingTransform(mask, PlainConvNet)
            steps += [tf.ActNorm(shape[0]), tf.OneByOneConvolution(shape[0]), coupling]
        shape = levels.add_transform(tf.CompositeTransform([squeeze, *steps]), shape)
    return WithLogit(LogProb(Flow(levels, StandardNormal([math.prod(SHAPE)]))))


METHODS = {
    "pyro_affine": ours,
    "pyro_affine, ReLU": lambda: ours(activation=nn.ReLU),
    "pyro_affine, memory=invertible": lambda: ours(memory="invertible"),
    "normflows": normflows_glow,
    "nflows": nflows_glow,
}


class Run:
    """One flow in training, its clock, and the best weights so far."""

    def __init__(self, make, first, *, learning_rate, budget, seed):
        torch.manual_seed(seed)
        self.flow, self.budget, self.learning_rate = make(), budget, learning_rate
        if isinstance(self.flow, NormalizingFlow):
            initialize_actnorms(self.flow.chain, first)
        else:
            self.flow.log_prob(first)  # starts the normalisation of the others
        self.optimizer = torch.optim.Adam(self.flow.parameters(), learning_rate)
        self.times, self.used, self.best, self.weights, self.looks = [], 0.0, math.inf, None, 0

    def step(self, batch):
        start = time.process_time()
        rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(self.used / self.budget, 1)))
        self.optimizer.param_groups[0]["lr"] = rate * min((len(self.times) + 1) / WARMUP, 1)
        self.gradients(batch)
        nn.utils.clip_grad_norm_(self.flow.parameters(), 100.0)
        self.optimizer.step()
        self.times.append(time.process_time() - start)
        self.used += self.times[-1]

    def gradients(self, batch):
        self.optimizer.zero_grad()
        (-self.flow.log_prob(batch).mean()).backward()

    @torch.no_grad()
    def look(self, held_out):
        """Score the weights, at each tenth of the budget."""
        if self.used < self.budget * (self.looks + 1) / NUM_LOOKS:
            return
        self.looks += 1
        score = -self.flow.log_prob(held_out).mean().item()
        if score < self.best:
            self.best, self.weights = score, copy.deepcopy(self.flow.state_dict())

    def peak(self, batch):
        with LiveBytes([*self.flow.parameters(), batch]) as live:
            self.gradients(batch)
        return live.peak(without=[p.grad for p in self.flow.parameters() if p.grad is not None])

    @torch.no_grad()
    def bits(self, test):
        self.flow.load_state_dict(self.weights)
        generator = torch.Generator().manual_seed(1)
        draws = [self.flow.log_prob(dequantize(test, LEVELS, generator=generator)).mean() for _ in range(8)]
        return float(bits_per_dim(torch.stack(draws).mean(), SHAPE, LEVELS))


def digits():
    images = torch.as_tensor(load_digits().images).long()[:, None]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].split([1297, 200, 300])


def train(names, budget, learning_rate, seed):
    train, held_out, test = digits()
    generator = torch.Generator().manual_seed(seed)
    first = dequantize(train[:512], LEVELS, generator=generator)
    held_out = dequantize(held_out, LEVELS, generator=generator)
    options = {"learning_rate": learning_rate, "budget": budget, "seed": seed}
    runs = {name: Run(METHODS[name], first, **options) for name in names}
    while waiting := [run for run in runs.values() if run.used < budget]:
        index = torch.randint(len(train), (BATCH_SIZE,), generator=generator)
        batch = dequantize(train[index], LEVELS, generator=generator)
        for run in waiting:
            run.step(batch)
            run.look(held_out)
    for name, run in runs.items():
        steps, milliseconds = len(run.times), 1000 * statistics.median(run.times)
        bits, peak = run.bits(test), run.peak(batch) / 2**20
        print(
            f"| {name} | {learning_rate:g} | {seed} | {bits:.3f} | {steps} | {milliseconds:.1f} | {peak:.1f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds for each flow")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    missing = [name for name in ("normflows", "nflows") if importlib.util.find_spec(name) is None]
    options.methods = [name for name in options.methods if name not in missing]
    torch.set_num_threads(1)
    print("".join(f"Left out: {name}, which is not installed\n" for name in missing), end="")
    print("| flow | learning rate | seed | test bits per dim | steps | ms per step | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for learning_rate in options.learning_rates:
        for seed in range(options.seeds):
            train(options.methods, options.seconds, learning_rate, seed)


if __name__ == "__main__":
    main()
