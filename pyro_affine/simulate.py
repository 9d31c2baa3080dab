"""Amortised inference by simulation: a posterior for any data that the model could have made, from one training."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_affine.amortised_density import AmortisedDensity
from pyro_affine.amortised_posterior import AmortisedPosterior
from pyro_affine.data_encoder import DataEncoder
from pyro_affine.fit_density import fit_density
from pyro_affine.fit_result import FitResult
from pyro_affine.latent_layout import LatentLayout
from pyro_affine.random_state import seeded
from pyro_affine.simulations import Simulations, Simulator

_EPOCHS, _FEWEST_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 100, 20, 300, 10_000
_FEWEST_ROWS = 11  # of which a tenth, two, are held out
_WAIT = 240  # steps without a new best on held-out simulations
_DECAY = 0.3  # share of the steps: late, as overfitting is held back by dropout before it only


class NeuralPosterior:
    """q(latents | data) for a Pyro model, trained on simulations by ``fit_posterior``; any data then cost one pass.

    The model is run as it stands: what it observes under the names in ``observed`` is drawn. Its latents are taken to
    unconstrained space by their supports and back. For latents z and data y of the model,

        q = argmax E_{p(z, y)} log q(z | y),

    which is the posterior for every y where the flow can express it. For one y alone, ``fit_posterior_at`` reaches more
    with as many simulations.

    Args:
        model: a Pyro model; or a simulator whose output is a ``pyro.deterministic`` site.
        observed: names of the sites that will be known.
        latents: names of the sites wanted; by default all. The others are averaged over, and may be discrete.
        args, kwargs: arguments of the model for the simulations.
        summary: a Module from the data to a vector; with several observed sites a dict of Modules by site. For
            i.i.d. rows ``DeepSets`` or ``SetTransformer``; the data may then have fewer rows than simulated.
        num_layers, hidden_dims, activation, seed: of the flow, as in ``conditional_real_nvp``.
        dropout: as in ``AmortisedDensity``; 0 for none.
        density: a density that was trained before, such as ``load`` gives, in place of a new one.

    Attributes:
        density: the Module to save: ``save("posterior.pt", npe.density)``.
        simulator: source of simulations.
        layout: of the latents in the vector.
        untrained: a copy of the density from before training; None for one that came trained.

    Raises:
        ValueError: naming the site, for one that the model has not, a discrete latent, one whose support depends on
            other latents, or one in a plate that subsamples; if a density is for other sites.

    Sources: Fast epsilon-free Inference of Simulation Models with Bayesian Conditional Density Estimation (Papamakarios
    and Murray, 2016); BayesFlow (Radev et al., 2020).

    >>> import pyro, pyro.distributions as dist
    >>> def model(y=None):
    ...     loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)
    >>> npe = NeuralPosterior(model, observed=["y"], num_layers=2, hidden_dims=(16,))
    >>> fit = fit_posterior(npe, num_simulations=500, num_steps=50, seed=0, progress=False)
    >>> npe.condition({"y": torch.ones(2)}).sample(100)["loc"].shape
    torch.Size([100, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        observed: Sequence[str],
        *,
        latents: Sequence[str] | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        summary: nn.Module | Mapping[str, nn.Module] | None = None,
        num_layers: int = 8,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        dropout: float = 0.1,
        seed: int = 0,
        density: AmortisedDensity | None = None,
    ) -> None:
        self.model = model
        self.simulator = Simulator(model, observed, latents, args=args, kwargs=kwargs)
        sites = self.simulator.sites
        shapes = {name: site["value"].shape for name, site in sites.items()}
        names = self.simulator.latents
        supports = {name: sites[name]["fn"].support for name in names}
        self.layout = LatentLayout({name: shapes[name] for name in names}, supports)
        observed_shapes = {name: shapes[name] for name in self.simulator.observed}
        if density is None:
            flow: dict[str, Any] = {"num_layers": num_layers, "hidden_dims": hidden_dims, "activation": activation}
            flow |= {"dropout": dropout, "seed": seed}
            encoder = DataEncoder(observed_shapes, _by_site(summary, self.simulator.observed))
            density = AmortisedDensity(self.layout.size, encoder, latents=self.layout.shapes, **flow)
            density = density.to(self.layout.unconstrain({name: sites[name]["value"] for name in names}))
        _require_same(density, self.layout, observed_shapes)
        self.density = density
        self.untrained = None if density.standardized else copy.deepcopy(density)

    def simulate(self, num_simulations: int, **options: Any) -> Simulations:
        """Pairs of latents and data; options as of ``Simulator.draw``."""
        return self.simulator.draw(num_simulations, **options)

    def condition(
        self, data: Mapping[str, Any], *, args: Sequence[Any] | None = None, kwargs: dict[str, Any] | None = None
    ) -> AmortisedPosterior:
        """The posterior at these data, for the weights of now: after more training, call it again.

        Args:
            data: value of each observed site, as the model draws it, or with a batch of data sets in front.
            args, kwargs: arguments of the model where these data need others than the simulations had, such as
                another number of rows; its likelihood is computed with them.

        Raises:
            ValueError: naming the site that is missing, unknown or of another shape.
        """
        simulator = self.simulator
        return AmortisedPosterior(
            self.density,
            self.layout,
            data,
            like={name: simulator.sites[name]["value"] for name in simulator.observed},
            model=self.model if simulator.has_likelihood else None,
            args=simulator.args if args is None else args,
            kwargs=simulator.kwargs if kwargs is None else kwargs,
            reason=self._no_likelihood(),
        )

    def pairs(self, simulations: Simulations) -> tuple[Tensor, Tensor]:
        """Unconstrained latents and packed data, row by row; rows that are not finite are left out, with a warning.

        Shapes: (N, number of unconstrained entries), (N, width of the packed data).
        """
        latents, packed, finite = self._pairs(simulations)
        if finite.sum() < _FEWEST_ROWS:
            raise ValueError(
                f"{_FEWEST_ROWS} simulations at least must be finite, got {int(finite.sum())} of {len(finite)}; "
                "simulate more, and look at one run of the model"
            )
        return latents[finite], packed[finite]

    def finite(self, simulations: Simulations) -> Simulations:
        """The simulations that ``pairs`` keeps, with the same warning."""
        return simulations[self._pairs(simulations)[2]]

    def _pairs(self, simulations: Simulations) -> tuple[Tensor, Tensor, Tensor]:
        """Unconstrained latents, packed data, and in which rows both are finite."""
        _require_rows(simulations)
        self.layout.require_values(simulations.latents)
        latents = self.layout.unconstrain(simulations.latents)
        packed = self.density.encoder.pack(simulations.data)
        finite = latents.isfinite().all(-1) & packed.isfinite().all(-1)
        if not finite.all() and finite.any():
            warnings.warn(
                f"{int((~finite).sum())} of {len(finite)} simulations are not finite and left out, so the prior is cut "
                "to where data are finite; if NaN stands for missing rows, use a summary such as DeepSets",
                stacklevel=4,
            )
        return latents, packed, finite

    def _no_likelihood(self) -> str:
        if self.simulator.averaged:
            return f"its sites {self.simulator.averaged} are averaged over"
        return "an observed site of it is pyro.deterministic"


def fit_posterior(
    npe: NeuralPosterior,
    *,
    num_simulations: int = 10_000,
    simulations: Simulations | None = None,
    sizes: tuple[int, int] | None = None,
    at_once: bool | None = None,
    path: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    patience: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> FitResult:
    """Train a ``NeuralPosterior`` by maximum likelihood on simulations from the prior.

    A tenth of the simulations is held out; the fit ends when their log-density no longer rises, and keeps the weights
    that are best on them. With no budget given (``num_steps``, ``num_epochs`` or ``seconds``) it takes at most 100
    passes over the simulations, within 300 and 10,000 steps: where simulations are few, more passes overfit.
    A second call goes on with the weights of the first, on new simulations.

    Args:
        npe: what to train.
        num_simulations: how many to draw.
        simulations: some drawn before, in place of new ones.
        sizes: smallest and largest number of rows of sites with a set summary: each simulated data set is cut to a
            number drawn between them, so that the posterior knows data of all these sizes.
        at_once, path: as in ``Simulator.draw``: whether many simulations run at once; folder to keep them in.
        batch_size: simulations in a step.
        patience: number of held-out scores, one in each pass or a few short ones, without a new best to wait for; by
            default those of 240 steps, four at least.
        seed: makes simulations and fit reproducible.
        progress: whether to show bars.
        options: further ones of ``fit_density``, such as ``num_steps``, ``seconds``, ``learning_rate``, ``checkpoint``.

    Returns:
        As of ``fit_density``; ``best`` is the mean held-out log q(u | data) of the unconstrained latents.

    Raises:
        ValueError: as ``Simulator.draw`` and ``fit_density`` do, or if ``sizes`` are out of range.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    ...     pyro.sample("count", dist.Poisson(rate))
    >>> npe = NeuralPosterior(model, observed=["count"], num_layers=2, hidden_dims=(16,))
    >>> fit = fit_posterior(npe, num_simulations=1000, num_steps=50, seed=0, progress=False)
    >>> bool(npe.condition({"count": 9}).sample(500, seed=0)["rate"].mean() > 3)
    True
    """
    with seeded(seed):
        if simulations is None:
            simulations = npe.simulate(num_simulations, at_once=at_once, path=path, progress=progress)
        if sizes is not None:
            simulations = _cut(simulations, npe.density.encoder, sizes)
        latents, packed = npe.pairs(simulations)
        npe.density.store_units(latents, packed)
        per_epoch = -(-len(latents) // batch_size)
        if not {"num_steps", "num_epochs", "seconds"} & set(options):
            options["num_steps"] = _num_steps(per_epoch)
        patience = max(4, _WAIT // max(per_epoch, 20)) if patience is None else patience
        call: dict[str, Any] = {"batch_size": batch_size, "patience": patience, "seed": seed, "progress": progress}
        return fit_density(npe.density, latents, packed, **call, **{"decay": _DECAY, **options})


def _num_steps(per_epoch: int) -> int:
    """A hundred epochs, within limits; twenty where there are so many simulations that these take longer."""
    return max(min(max(_EPOCHS * per_epoch, _FEWEST_STEPS), _MOST_STEPS), _FEWEST_EPOCHS * per_epoch)


def _by_site(summary: Any, observed: Sequence[str]) -> Mapping[str, nn.Module]:
    if isinstance(summary, nn.Module):
        if len(observed) > 1:
            raise ValueError(
                f"with several observed sites summary must be a dict of Modules by site, got one Module for "
                f"{list(observed)}; write summary={{site: module}}"
            )
        return {observed[0]: summary}
    return summary or {}


def _require_same(density: AmortisedDensity, layout: LatentLayout, shapes: dict[str, torch.Size]) -> None:
    known = layout.shapes if density.latents is None else density.latents
    wanted = _words(layout.size, layout.shapes, shapes)
    found = _words(density.event_shape.numel(), known, density.encoder.shapes)
    if found != wanted:
        raise ValueError(
            f"the density must be for {wanted}, got one for {found}; pass the model that it was trained for"
        )


def _require_rows(simulations: Simulations) -> None:
    sizes = {name: len(x) for part in (simulations.latents, simulations.data) for name, x in part.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"each site of simulations must have the same number of rows, got {sizes}; cut them to one size"
        )


def _words(size: int, *parts: Mapping[str, torch.Size]) -> str:
    latents, observed = ({name: tuple(shape) for name, shape in shapes.items()} for shapes in parts)
    return f"latents {latents}, {size} unconstrained numbers in all, and observed sites {observed}"


def _cut(simulations: Simulations, encoder: DataEncoder, sizes: tuple[int, int]) -> Simulations:
    """Each data set with a number of rows drawn between two sizes; the others NaN, which stands for missing."""
    sets = [name for name in simulations.data if encoder.is_set(name)]
    largest = min((encoder.shapes[name][0] for name in sets), default=0)
    if not sets or not 1 <= sizes[0] <= sizes[1] <= largest:
        raise ValueError(
            f"sizes must be two numbers of rows between 1 and {largest}, those of sites with a set summary such as "
            f"DeepSets, got {sizes} for sites {sets}"
        )
    data = dict(simulations.data)
    device = data[sets[0]].device
    number = torch.randint(sizes[0], sizes[1] + 1, (len(simulations),), device=device)
    for name in sets:
        rows = data[name] if data[name].is_floating_point() else data[name].to(encoder.loc.dtype)
        missing = torch.arange(rows.shape[1], device=device) >= number[:, None]
        data[name] = rows.masked_fill(missing.reshape(*missing.shape, *[1] * (rows.dim() - 2)), torch.nan)
    return Simulations(simulations.latents, data)
