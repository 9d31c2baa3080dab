"""The Module that owns a flow, its base and the units of its data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow, as_flow
from pyro_affine.correlations import Correlations
from pyro_affine.curves import Curves
from pyro_affine.linear import Standardization
from pyro_affine.memory import is_real
from pyro_affine.normal import normal_log_prob, sum_event
from pyro_affine.student import UncheckedStudentT

_NUM_KNOTS = 24  # a quarter of a standard deviation apart
_HEAVY, _NEARLY_NORMAL = 30.0, 200.0  # degrees of freedom to start from; without any curve the data look normal
_LARGEST_DENSE = 1000  # entries: beyond, the matrix costs more than the couplings
_ROWS_AT_ONCE = 1024  # on their way through a layer while units are fitted, as curves take six times their memory


class NormalizingFlow(nn.Module):
    """A density: a flow, its base (standard normal; Student's t for vectors, see ``tails``) and the units of the data.

    ``flow()`` or ``flow(context)`` gives a Pyro ``TransformedDistribution``, to be used in ``pyro.sample`` or by
    itself; ``log_prob``, ``sample``, ``rsample`` and ``rsample_and_log_prob`` are shorter ways that remember
    nothing. log p(y) = log p_base(x) - log|det dy/dx|.

    Where the transform ends in the whole real line, its data have units. ``standardize`` stores their means and
    standard deviations. ``fit_units``, which ``fit_density`` calls, stores these, fits a monotone curve to each entry
    and whitens what comes out: y = loc + scale * curve(L x + m). The flow then starts as the Gaussian copula of the
    data, up to its tails. Other supports, such as that of a last ``SigmoidTransform``, have no units.

    Args:
        transform: any bijective transform, or a conditional one; base to data.
        event_shape: shape of one event of the data, or its number of entries; where the flow changes the shape, as from
            flat latents to images, that of the base will do too, unless the flow is conditional.
        curves: number of knots of the curve of each entry, trained with the rest; 0 for straight lines. Default: 24 for
            unconditional vectors, else 0.
        whiten: whether ``fit_units`` stores the correlations, for vectors. Default: for unconditional vectors of
            2 to 1000 entries.
        tails: "student" makes curves straight beyond the data and the base Student's t, its degrees of freedom trained,
            30 at first: farther is less likely. "log" keeps the normal base and makes curves logarithms there, with a
            reach for each column and side; along a ray of far points the density need then not fall at each step.
            "normal": normal base, straight curves. Default: "student" where there are curves, else "normal".

    Raises:
        ValueError: if ``transform`` is no transform or takes other events; if it has no units, but curves or
            whitening are wanted; on call, if a context is missing or not wanted.

    >>> from pyro_affine.flows import real_nvp
    >>> flow = NormalizingFlow(real_nvp(3), 3)
    >>> flow.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    >>> flow().sample((5,)).shape
    torch.Size([5, 3])
    """

    loc: Tensor
    scale: Tensor
    chain: Any  # a ComposeFlow or a ConditionalComposeFlow
    data_shape: Size | None = None  # in files from before it was known

    def __init__(
        self,
        transform: Transform | ConditionalTransform,
        event_shape: int | Sequence[int],
        *,
        curves: int | None = None,
        whiten: bool | None = None,
        tails: Literal["student", "log", "normal"] | None = None,
    ) -> None:
        super().__init__()
        self.conditional = isinstance(transform, ConditionalTransform)
        transform = transform if self.conditional else as_flow(transform)
        self.event_shape, self.data_shape = _sides(transform, _as_shape(event_shape))
        compose = ConditionalComposeFlow if self.conditional else ComposeFlow
        if tails not in (None, "student", "log", "normal"):
            raise ValueError(f'tails must be "student", "log" or "normal", got {tails!r}')
        in_reals = is_real(getattr(transform, "codomain", constraints.real))
        vectors = in_reals and len(self.data_shape) == 1 and not self.conditional
        curves = (_NUM_KNOTS if vectors else 0) if curves is None else curves
        whiten = vectors and 1 < self.data_shape[0] <= _LARGEST_DENSE if whiten is None else whiten
        self.tails = tails or ("student" if curves else "normal")
        units = self._units(curves, whiten) if in_reals else []
        if not units and (curves or whiten):
            codomain = getattr(transform, "codomain", None)
            raise ValueError(
                f"curves and whitening are for data on the whole real line, got a flow onto {codomain}; leave them out"
            )
        self.chain = compose([transform, *units])
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        if self.tails == "student":
            self.raw_df = nn.Parameter(torch.full(self.event_shape, _raw_df(_HEAVY)))

    @property
    def transform(self) -> nn.Module:
        """The flow between the base and the standardised data."""
        return self.chain.parts[0]  # type: ignore[no-any-return]

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        """The distribution; its batch shape is that of the context. Context shape: batch + (context_dim,)."""
        return dist.TransformedDistribution(self._base(), [self._chain(context)])

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each event, in nats. Value shape: batch + data_shape; result: batch."""
        chain = self._chain(context)
        if (value.dtype, value.device) == (self.loc.dtype, self.loc.device):
            chain.inverse_shape(value.shape)
        else:  # which looks at each parameter
            chain._check(value, chain.inverse_shape)
        return self._log_density(*chain._backward(value))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile ``log_prob`` in place, with the arguments of ``torch.compile``; weights keep their names.

        A Module's own ``compile`` is for ``forward``, which makes a distribution here. Copies and files hold the flow
        without it. Training is compiled by ``fit_density(..., compile=True)``.
        """
        self.__dict__["log_prob"] = torch.compile(type(self).log_prob.__get__(self), *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "log_prob"}

    @torch.no_grad()
    def sample(self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradients. Shape: sample_shape + context batch + data_shape."""
        return self.rsample(sample_shape, context)

    def rsample(self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws with gradients with respect to the parameters. Shape as of ``sample``."""
        return self._draw(sample_shape, context)[1]

    def rsample_and_log_prob(
        self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log-densities in nats, in one pass. Shapes: as of ``sample``, and that without data_shape."""
        x, y, log_det = self._draw(sample_shape, context)
        return y, self._log_density(x, log_det)

    def standardize(self, data: Tensor) -> None:
        """Store mean and standard deviation of the data, (N,) + data_shape, so that the flow sees unit scales."""
        if len(self.chain.parts) == 1:
            raise ValueError(
                f"data with units live on the whole real line, got a flow onto {self.transform.codomain}; leave them "
                "as they are"
            )
        self.chain.parts[-1].fit(data)

    @property
    def standardized(self) -> bool:
        """Whether it has units of data, or curves that were trained: ``fit_density`` then leaves them as they are."""
        layers = self.chain.parts[1:]
        return any(not layer.is_new for layer in layers[:-1] or layers)  # the last alone may be from ``standardize``

    @torch.no_grad()
    def fit_units(self, data: Tensor) -> None:
        """Store the units of the data, if any: ``standardize``, then curves and correlations, (N,) + data_shape.

        Weights that are trained hold in the units from before: a flow for other data is better made anew.
        """
        if len(self.chain.parts) == 1:
            return
        self.standardize(data)
        for layer in reversed(self.chain.parts[1:]):
            if not isinstance(layer, Standardization):
                num_curved = layer.fit(data)
            if isinstance(layer, Curves) and self.tails == "student":
                self.raw_df.fill_(_raw_df(_HEAVY if num_curved else _NEARLY_NORMAL))
            if layer is not self.chain.parts[1]:  # whose result none waits for
                data = torch.cat([layer._backward(rows)[0] for rows in data.split(_ROWS_AT_ONCE)])

    def _units(self, curves: int, whiten: bool) -> list[Any]:
        shape = self.data_shape or self.event_shape
        if whiten and len(shape) != 1:
            raise ValueError(f"only vectors can be whitened, got event shape {tuple(shape)}; flatten events")
        layers: list[Any] = [Correlations(shape[0])] if whiten else []
        layers += [Curves(shape, curves, straight_tails=self.tails != "log")] if curves else []
        return [*layers, Standardization(shape)]

    def _base(self) -> dist.TorchDistribution:
        unvalidated: Any = dist.Normal(self.loc, self.scale, validate_args=False)  # validation does not compile
        if self.tails == "student":
            unvalidated = UncheckedStudentT(1 + self.raw_df.exp(), self.loc, self.scale)
        return dist.Independent(unvalidated, len(self.event_shape), validate_args=False)

    def _draw(self, sample_shape: int | Sequence[int], context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and log|det dy/dx|."""
        base, chain, shape = self._base(), self._chain(context), _as_shape(sample_shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"sample_shape must hold numbers of draws, 0 or more, got {tuple(shape)}")
        if self.conditional or chain.batch_shape:
            base = dist.TransformedDistribution(base, [chain]).base_dist  # which has the batch shape of the context
        x = base.rsample(shape)
        return x, *chain._forward(x)

    def _log_base(self, x: Tensor) -> Tensor:
        if self.tails == "student":
            return sum_event(self._base().base_dist.log_prob(x), len(self.event_shape))
        return normal_log_prob(x, self.loc, self.scale)

    def _log_density(self, x: Tensor, log_det: Tensor) -> Tensor:
        """log p(y) of what comes from x; the log_det of an elementwise chain still has the dimensions of an event."""
        log_base = self._log_base(x)
        return log_base - sum_event(log_det, max(log_det.dim() - log_base.dim(), 0))

    def _chain(self, context: Tensor | None) -> ComposeFlow:
        if self.conditional != (context is not None):
            raise ValueError(
                "a conditional flow needs a context and an unconditional one takes none, got "
                f"{'no context' if context is None else 'a context'} for a flow that is "
                f"{'conditional' if self.conditional else 'not conditional'}; see conditional_real_nvp"
            )
        return self.chain.condition(context) if self.conditional else self.chain  # type: ignore[no-any-return]


def _raw_df(degrees_of_freedom: float) -> float:
    return math.log(degrees_of_freedom - 1)


def _sides(transform: Any, shape: Size) -> tuple[Size, Size]:
    """Shape of an event of the base and of the data, of which one is given."""
    if isinstance(transform, ConditionalTransform):  # which knows its ranks at most
        first = transform.parts[0] if isinstance(transform, ConditionalComposeFlow) else transform
        domain, codomain = getattr(first, "domain", None), getattr(transform, "codomain", None)
        ranks = getattr(domain, "event_dim", 0), getattr(codomain, "event_dim", 0)
        is_flat = ranks == (1, len(shape)) and len(shape) > 1
        return (Size([shape.numel()]) if is_flat else shape), shape
    own = transform.event_shape
    is_data = own is not None and transform.forward_shape(own)[-transform.codomain.event_dim :] == shape
    base = own if is_data else shape
    data = transform.forward_shape(base)
    rank = len(base) + transform.codomain.event_dim - transform.domain.event_dim
    return base, data[len(data) - rank :]


def _as_shape(shape: int | Sequence[int]) -> Size:
    return Size([shape] if isinstance(shape, int) else shape)
