"""Affine coupling flows (NICE, RealNVP, Glow) for Pyro: densities, guides, conditional posteriors."""

from pyro_affine.actnorm import ActNorm, initialize_actnorms
from pyro_affine.amortised_density import AmortisedDensity
from pyro_affine.amortised_posterior import AmortisedPosterior
from pyro_affine.audit import AuditReport, audit
from pyro_affine.bounded_input import BoundedInput
from pyro_affine.calibration import Coverage, Ranks, expected_coverage, plot_sbc, sbc_ranks
from pyro_affine.columns import TableDensity
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditional_guide import AutoConditionalRealNVP
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.conv_net import ConvNet, ResidualConvNet
from pyro_affine.correlations import Correlations
from pyro_affine.coupling import (
    AffineCoupling,
    ConditionalAffineCoupling,
    affine_coupling,
    conditional_affine_coupling,
)
from pyro_affine.curves import Curves
from pyro_affine.diagnostics import draw_posterior, psis
from pyro_affine.draws_on_disk import write_draws, write_log_prob
from pyro_affine.export import to_arviz
from pyro_affine.fit import fit_guide
from pyro_affine.fit_density import fit_density
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.gradients import PathGradientDistribution
from pyro_affine.guides import AutoRealNVP
from pyro_affine.health import health
from pyro_affine.health_report import HealthReport
from pyro_affine.image_flows import conditional_glow, glow, image_real_nvp
from pyro_affine.images import LogitImages, bits_per_dim, dequantize
from pyro_affine.invertible_linear import InvertibleLinear, invertible_conv1x1
from pyro_affine.known_classes import register_class
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask, random_mask
from pyro_affine.neutra import NeutraResult, neutra
from pyro_affine.plots import plot_pairs, plot_weights
from pyro_affine.psis_result import PSISResult
from pyro_affine.reshape import ConditionalMultiScale, MultiScale, Squeeze
from pyro_affine.rounds import Round, fit_posterior_at
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
from pyro_affine.simulate import NeuralPosterior, fit_posterior
from pyro_affine.simulations import Simulations
from pyro_affine.stored_rows import stored_rows
from pyro_affine.summaries import DeepSets, SetTransformer
from pyro_affine.tails import LOFT
from pyro_affine.transform import FlowTransform
from pyro_affine.whitening import Whitening

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "TableDensity",
    "Curves",
    "Correlations",
    "BoundedInput",
    "AdditiveScale",
    "AffineCoupling",
    "AmortisedDensity",
    "AmortisedPosterior",
    "AtanScale",
    "AuditReport",
    "AutoConditionalRealNVP",
    "AutoRealNVP",
    "ComposeFlow",
    "ConditionalAffineCoupling",
    "ConditionalComposeFlow",
    "ConditionalMultiScale",
    "ConvNet",
    "Coverage",
    "DeepSets",
    "ExpScale",
    "FitResult",
    "FlowTransform",
    "HealthReport",
    "InvertibleLinear",
    "LOFT",
    "LogitImages",
    "LowRankAffine",
    "LowerTriangularAffine",
    "MLP",
    "MultiScale",
    "NeuralPosterior",
    "NeutraResult",
    "NonFiniteError",
    "NormalizingFlow",
    "PSISResult",
    "PathGradientDistribution",
    "Permutation",
    "Ranks",
    "ResidualConvNet",
    "ResidualMLP",
    "Round",
    "ScaleMap",
    "SetTransformer",
    "SigmoidScale",
    "Simulations",
    "SoftplusScale",
    "Squeeze",
    "Standardization",
    "TanhScale",
    "Whitening",
    "affine_coupling",
    "alternating_mask",
    "audit",
    "bits_per_dim",
    "channel_mask",
    "checkerboard_mask",
    "conditional_affine_coupling",
    "conditional_glow",
    "conditional_real_nvp",
    "dequantize",
    "draw_posterior",
    "expected_coverage",
    "fit_density",
    "fit_guide",
    "fit_posterior",
    "fit_posterior_at",
    "glow",
    "half_mask",
    "health",
    "image_real_nvp",
    "initialize_actnorms",
    "invertible_conv1x1",
    "load",
    "load_guide",
    "neutra",
    "plot_pairs",
    "plot_sbc",
    "plot_weights",
    "psis",
    "random_mask",
    "real_nvp",
    "register_class",
    "save",
    "sbc_ranks",
    "stored_rows",
    "to_arviz",
    "write_draws",
    "write_log_prob",
]
