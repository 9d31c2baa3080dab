"""The posterior that a trained density gives for some data: draws, log-densities, weights, and the way to ArviZ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Size, Tensor

from pyro_affine.amortised_density import AmortisedDensity
from pyro_affine.diagnostics import psis
from pyro_affine.export import to_arviz
from pyro_affine.inference_data import inference_data
from pyro_affine.latent_layout import LatentLayout
from pyro_affine.particles import first_success
from pyro_affine.psis_result import PSISResult
from pyro_affine.random_state import seeded


class AmortisedPosterior:
    """q(latents | data) at given data, over the sites of the model. ``NeuralPosterior.condition`` makes it.

    Args:
        density: trained.
        layout: of the latents.
        data: values of the observed sites. A leading batch of data sets gives a batch of posteriors.
        like: a value of each observed site as the model draws it, for dtype and device: counts given as integers, or
            booleans, become what the model's likelihood takes. None to leave them.
        model: with its likelihood; None where it has none.
        args, kwargs: arguments of the model, for these data.
        reason: why there is no likelihood.

    Attributes:
        batch_shape: () for one data set.
        data: as given.
    """

    def __init__(
        self,
        density: AmortisedDensity,
        layout: LatentLayout,
        data: Mapping[str, Tensor],
        *,
        like: Mapping[str, Tensor] | None = None,
        model: Callable[..., Any] | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        if not isinstance(data, Mapping):
            sites = list(density.encoder.shapes)
            raise ValueError(f"data must be a dict of values by site, got {type(data).__name__}; its keys are {sites}")
        known, default = like or {}, density.encoder.loc
        self.data = {name: _as_tensor(name, value, known.get(name, default)) for name, value in data.items()}
        self._layout, self._model, self._args, self._kwargs = layout, model, args, kwargs or {}
        self._reason = reason
        packed = _packed(density, self.data)
        self._vectors = density.at(packed)
        self.batch_shape = packed.shape[:-1]

    def sample(self, sample_shape: int | Sequence[int] = (), *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws by site. Shape of each: sample_shape + batch_shape + shape of the site."""
        shape = Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        with seeded(seed), torch.no_grad():
            return self._layout.constrain(self._vectors.sample(shape))

    @torch.no_grad()
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of values of all latents, in nats, -inf outside the supports.

        log q(z | data) = log q(u | data) - log|det dz/du|, u the unconstrained z.

        Args:
            values: by site, each of shape batch + shape of the site, the batch broadcastable with ``batch_shape``.

        Raises:
            ValueError: naming a site that is missing or of another shape.
        """
        self._layout.require_values(values)
        u = self._layout.unconstrain(values)
        inside = self._layout.contains(values) & u.isfinite().all(-1)  # a closed boundary lies at infinity
        u = torch.where(inside[..., None], u, 0.0)
        log_prob = self._vectors.log_prob(u) - self._layout.log_det(u)
        return torch.where(inside, log_prob, -torch.inf)

    @torch.no_grad()
    def wide_draws(self, num_draws: int, share: float) -> tuple[dict[str, Tensor], Tensor]:
        """Draws as wide as the region that all but a share of plain draws lie in, and their log-densities in nats.

        Base draws are stretched until their mean square is the (1 - share)-quantile of that of plain ones, a chi-square
        over D, by Wilson and Hilferty's cube: about half of them lie in the region of a Gaussian posterior.
        """
        base, flow, size = self._vectors.base_dist, self._vectors.transforms[0], self._layout.size
        variance = 2 / (9 * size)
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * share, dtype=torch.float64)))
        factor = (1 - variance + z * math.sqrt(variance)) ** 1.5
        x = base.sample((num_draws,))
        u = flow(factor * x)
        log_det = flow.log_abs_det_jacobian(factor * x, u) + size * math.log(factor)
        return self._layout.constrain(u), base.log_prob(x) - log_det - self._layout.log_det(u)

    def guide(self) -> AutoContinuous:
        """A Pyro guide with the draws of this posterior, for the model conditioned on the data; nothing to train."""
        return _PosteriorGuide(self._require_model(), self._vectors)

    def psis(self, num_draws: int = 4000, *, seed: int | None = None, progress: bool = True) -> PSISResult:
        """Draws weighted by the model's likelihood, with a verdict: log weight = log p(z, data) - log q(z | data).

        Raises:
            ValueError: if the model has no likelihood, draws the data in another shape, or the posterior is of a batch
                of data sets.
        """
        model = self._require_model()
        options: dict[str, Any] = {"num_draws": num_draws, "seed": seed, "progress": progress}
        return psis(model, self.guide(), *self._args, **options, **self._kwargs)

    def to_arviz(self, num_draws: int = 1000, *, seed: int | None = None, **options: Any) -> Any:
        """ArviZ container: all of ``pyro_affine.to_arviz``, with its options; without a likelihood, draws and data.

        ``predictive=True`` adds posterior predictive draws, for checks such as ``arviz.plot_ppc``
        (``plot_ppc_dist`` from ArviZ 1 on).

        Raises:
            ValueError: for options that need a likelihood where there is none, or a batch of data sets.
        """
        self.require_one_data_set()
        if self._model is not None:
            call: dict[str, Any] = {"num_draws": num_draws, "seed": seed, **options, **self._kwargs}
            return to_arviz(self._require_model(), self.guide(), *self._args, **call)
        known = {name: options.pop(name) for name in ("coords", "dims") if name in options}
        if any(options.values()):
            raise ValueError(f"{sorted(options)} need a model with a likelihood, but {self._reason}; leave them out")
        draws: dict[str, np.ndarray] = {n: x.cpu().numpy()[None] for n, x in self.sample(num_draws, seed=seed).items()}
        data = {name: value.cpu().numpy() for name, value in self.data.items()}
        attrs = {"posterior": {"draws": "of the amortised posterior, without weights"}}
        return inference_data({"posterior": draws, "observed_data": data}, attrs=attrs, **known)

    def require_one_data_set(self) -> None:
        """Refuse a batch of data sets.

        Raises:
            ValueError: with the shape of the batch.
        """
        if self.batch_shape:
            raise ValueError(
                f"this is for one data set, got a batch of shape {tuple(self.batch_shape)}; condition on one of them"
            )

    def _require_model(self) -> Callable[..., Any]:
        self.require_one_data_set()
        if self._model is None:
            raise ValueError(
                f"the model must have a likelihood to weight draws with, but {self._reason}; check the posterior by "
                "sbc_ranks and expected_coverage instead"
            )
        conditioned: Callable[..., Any] = poutine.condition(self._model, data=self.data)
        self._require_shapes(conditioned)
        return conditioned

    def _require_shapes(self, conditioned: Callable[..., Any]) -> None:
        """In a plate of another number of rows, data would be repeated to fill it, and counted as often."""
        with seeded(0), torch.no_grad():
            trace = first_success(lambda: poutine.trace(conditioned).get_trace(*self._args, **self._kwargs))
        for name, value in self.data.items():
            drawn = trace.nodes[name]["fn"].shape()
            if drawn != value.shape:
                raise ValueError(
                    f"with its arguments the model must draw each observed site in the shape of its data, got site "
                    f"'{name}' of shape {tuple(drawn)} and data of shape {tuple(value.shape)}; pass the arguments for "
                    "these data: condition(data, kwargs=...)"
                )


def _packed(density: AmortisedDensity, data: Mapping[str, Tensor]) -> Tensor:
    packed = density.encoder.pack(data)
    if not packed.isfinite().all():
        bad = [name for name, value in data.items() if not value.isfinite().all()]
        raise ValueError(
            f"data must be finite, got NaN or inf in site {bad}; simulate with NaN and a summary such as DeepSets if "
            "rows may be missing"
        )
    return packed


def _as_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """On the device of another tensor, and in its dtype if that is a floating-point one."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the data of site '{name}' must be numbers in a tensor, an array or nested lists of one length, got "
            f"{type(value).__name__} ({error}); missing rows are NaN"
        ) from error
    return tensor.to(like) if like.is_floating_point() else tensor.to(like.device)


class _PosteriorGuide(AutoContinuous):
    """Draws of a given distribution of the unconstrained latents, laid out by Pyro in the model's sites."""

    def __init__(self, model: Callable[..., Any], vectors: dist.TransformedDistribution) -> None:
        super().__init__(model, init_loc_fn=init_to_sample)
        self._vectors = vectors

    def get_base_dist(self) -> dist.TorchDistribution:
        return self._vectors.base_dist  # type: ignore[no-any-return]

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        return self._vectors.transforms[0]

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        return self._vectors
