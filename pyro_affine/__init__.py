"""Affine coupling flows (NICE, RealNVP, Glow) for Pyro: densities, guides, conditional posteriors."""

from pyro_affine.audit import AuditReport, audit
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.coupling import (
    AffineCoupling,
    ConditionalAffineCoupling,
    affine_coupling,
    conditional_affine_coupling,
)
from pyro_affine.diagnostics import draw_posterior, psis
from pyro_affine.export import to_arviz
from pyro_affine.fit import fit_guide
from pyro_affine.fit_density import fit_density
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.gradients import PathGradientDistribution
from pyro_affine.guides import AutoRealNVP
from pyro_affine.health import health
from pyro_affine.health_report import HealthReport
from pyro_affine.known_classes import register_class
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask, random_mask
from pyro_affine.neutra import NeutraResult, neutra
from pyro_affine.plots import plot_pairs, plot_weights
from pyro_affine.psis_result import PSISResult
from pyro_affine.scales import (
    AdditiveScale,
    AtanScale,
    ExpScale,
    ScaleMap,
    SigmoidScale,
    SoftplusScale,
    TanhScale,
)
from pyro_affine.serialize import load, load_guide, save
from pyro_affine.tails import LOFT
from pyro_affine.transform import FlowTransform
from pyro_affine.whitening import Whitening

__version__ = "0.1.0"

__all__ = [
    "AdditiveScale",
    "AffineCoupling",
    "AtanScale",
    "AuditReport",
    "AutoRealNVP",
    "ComposeFlow",
    "ConditionalAffineCoupling",
    "ConditionalComposeFlow",
    "ExpScale",
    "FitResult",
    "FlowTransform",
    "HealthReport",
    "LOFT",
    "LowRankAffine",
    "LowerTriangularAffine",
    "MLP",
    "NeutraResult",
    "NonFiniteError",
    "NormalizingFlow",
    "PSISResult",
    "PathGradientDistribution",
    "Permutation",
    "ResidualMLP",
    "ScaleMap",
    "SigmoidScale",
    "SoftplusScale",
    "Standardization",
    "TanhScale",
    "Whitening",
    "affine_coupling",
    "alternating_mask",
    "audit",
    "channel_mask",
    "checkerboard_mask",
    "conditional_affine_coupling",
    "conditional_real_nvp",
    "draw_posterior",
    "fit_density",
    "fit_guide",
    "half_mask",
    "health",
    "load",
    "load_guide",
    "neutra",
    "plot_pairs",
    "plot_weights",
    "psis",
    "random_mask",
    "real_nvp",
    "register_class",
    "save",
    "to_arviz",
]
