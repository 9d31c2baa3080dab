"""The density estimators of the benchmark: peers under one training loop, a Gaussian, and ours by its one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from density_variants import VARIANTS
from torch import Tensor, nn

from pyro_affine import fit_density

NUM_LAYERS, HIDDEN_DIMS, BATCH_SIZE, LEARNING_RATE, LARGEST_NORM = 8, (128, 128), 512, 1e-3, 5.0
_EVALUATIONS, _EVALUATION_ROWS = 30, 5000  # of the validation rows, over the budget

Row = dict[str, Any]
LogProb = Callable[[Tensor], Tensor]


@dataclass
class Fitted:
    """A fitted density: log-densities of rows as given, its parameters, and what else belongs into the row."""

    log_prob: LogProb
    parameters: list[Tensor]
    notes: Row = field(default_factory=dict)


class _PyroCoupling(nn.Module):
    """Pyro's coupling with the entries reversed between layers, the repair that its users make by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        flip = torch.arange(size).flip(0)
        layers = []
        for _ in range(NUM_LAYERS):
            layers += [pyro_transforms.affine_coupling(size, list(HIDDEN_DIMS)), pyro_transforms.Permute(flip)]
        self.layers = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)])
        self._chain, self._size = layers, size

    def log_prob(self, y: Tensor) -> Tensor:
        """In a pass of its own: Pyro's cache returns yesterday's answer for the same rows."""
        log_det = torch.zeros(())
        for layer in reversed(self._chain):
            x = layer._inverse(y)
            log_det = log_det + layer.log_abs_det_jacobian(x, y)
            y = x
        return dist.Normal(torch.zeros(self._size), 1.0).to_event(1).log_prob(y) - log_det


class _Zuko(nn.Module):
    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        import zuko

        make = getattr(zuko.flows, name)
        self.flow = make(size, transforms=NUM_LAYERS, hidden_features=HIDDEN_DIMS)

    def log_prob(self, y: Tensor) -> Tensor:
        log_prob: Tensor = self.flow().log_prob(y)
        return log_prob


def _nflows(size: int) -> Any:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform, RandomPermutation

    def network(num_inputs: int, num_outputs: int) -> nn.Module:
        return _mlp(num_inputs, num_outputs)

    layers: list[nn.Module] = []
    for index in range(NUM_LAYERS):
        mask = torch.ones(size)
        mask[index % 2 :: 2] = -1
        layers += [AffineCouplingTransform(mask, _Ignoring(network)), RandomPermutation(size)]
    return Flow(CompositeTransform(layers), StandardNormal([size]))


class _Ignoring:
    """Makes networks that take a context, as nflows calls them, and do without."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        self.make = make

    def __call__(self, num_inputs: int, num_outputs: int) -> nn.Module:
        network = self.make(num_inputs, num_outputs)
        network.forward = lambda inputs, context=None, run=network.forward: run(inputs)  # type: ignore[method-assign]
        return network


def _normflows(size: int) -> Any:
    import normflows

    layers = []
    for index in range(NUM_LAYERS):
        mask = (torch.arange(size) + index) % 2 == 0
        scale, shift = (normflows.nets.MLP([size, *HIDDEN_DIMS, size], init_zeros=True) for _ in range(2))
        layers.append(normflows.flows.MaskedAffineFlow(mask.float(), shift, scale))
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(size), layers)


class _Freia(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        from FrEIA.framework import SequenceINN
        from FrEIA.modules import AllInOneBlock

        self.size, self.chain = size, SequenceINN(size)
        for _ in range(NUM_LAYERS):
            self.chain.append(AllInOneBlock, subnet_constructor=_mlp)

    def log_prob(self, y: Tensor) -> Tensor:
        x, log_det = self.chain(y)
        log_prob: Tensor = log_det - 0.5 * (x**2).sum(-1) - 0.5 * self.size * math.log(2 * math.pi)
        return log_prob


def _mlp(num_inputs: int, num_outputs: int) -> nn.Sequential:
    sizes = (num_inputs, *HIDDEN_DIMS, num_outputs)
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


PEERS: dict[str, Callable[[int], Any]] = {
    "Pyro AffineCoupling + flips": _PyroCoupling,
    "zuko NICE": lambda size: _Zuko("NICE", size),
    "nflows AffineCoupling": _nflows,
    "normflows MaskedAffineFlow": _normflows,
    "FrEIA AllInOneBlock": _Freia,
    "zuko NSF": lambda size: _Zuko("NSF", size),  # autoregressive splines: a mark from another family
}
OURS, GAUSSIAN = "ours", "full Gaussian"
METHODS = (OURS, *PEERS, GAUSSIAN)
ABLATIONS = tuple(name for name in VARIANTS if name != OURS)
COUPLINGS = tuple(name for name in PEERS if name != "zuko NSF")


def fit(method: str, train: Tensor, validation: Tensor, *, seconds: float) -> Fitted:
    """Fit a method; its budget starts when the loop does."""
    if method in VARIANTS:
        return _fit_ours(method, torch.cat([train, validation]), seconds)
    if method == GAUSSIAN:
        loc, factor = train.double().mean(0), torch.linalg.cholesky(train.double().T.cov())
        gaussian = dist.MultivariateNormal(loc, scale_tril=factor)
        return Fitted(lambda y: gaussian.log_prob(y.double()), [loc, factor])
    loc, scale = train.mean(0), train.std(0)
    model = PEERS[method](train.shape[-1])
    notes = _train(model, (train - loc) / scale, (validation - loc) / scale, seconds)
    return Fitted(lambda y: model.log_prob((y - loc) / scale) - scale.log().sum(), list(model.parameters()), notes)


def _fit_ours(name: str, data: Tensor, seconds: float) -> Fitted:
    """All rows that are not test rows: the call holds a tenth of them out by itself."""
    variant = VARIANTS[name]
    flow = variant.build(data.shape[-1])
    result = fit_density(flow, data, seconds=seconds, **variant.fit)
    flow.eval()
    notes = {"steps": result.num_steps, "seconds_used": result.seconds, "reason": result.reason}
    return Fitted(flow.log_prob, list(flow.parameters()), notes | {"validation": result.best, "chosen": result.chosen})


def _train(model: Any, train: Tensor, validation: Tensor, seconds: float) -> Row:
    """Adam under a cosine in the clock, clipped gradients, the weights that score best on validation rows."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    best, best_weights, steps, evaluated = -math.inf, None, 0, 0
    validation, start, order = validation[:_EVALUATION_ROWS], time.perf_counter(), torch.empty(0, dtype=torch.long)
    progress = 0.0
    while progress < 1:
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(train))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.zero_grad()
        loss = -model.log_prob(train[batch]).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        if torch.isfinite(loss) and torch.isfinite(norm):
            optimizer.step()
        steps += 1
        progress = (time.perf_counter() - start) / seconds
        if progress * _EVALUATIONS >= evaluated + 1 or progress >= 1:
            evaluated = int(progress * _EVALUATIONS)
            value = float(score(model.log_prob, validation).mean())
            if value > best:
                best, best_weights = value, {name: p.clone() for name, p in model.state_dict().items()}
    used = time.perf_counter() - start
    if best_weights is None:
        raise FloatingPointError("the validation score was never finite")
    model.load_state_dict(best_weights)
    return {"steps": steps, "seconds_used": used, "validation": best}


@torch.no_grad()
def score(log_prob: LogProb, rows: Tensor) -> Tensor:
    """Log-densities of rows, in float64."""
    return torch.cat([log_prob(chunk).double() for chunk in rows.split(2000)])
