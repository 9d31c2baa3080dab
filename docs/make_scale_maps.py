"""Draw the scale maps and their slopes: python docs/make_scale_maps.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from pyro_affine import AdditiveScale, AtanScale, ExpScale, SigmoidScale, SoftplusScale, TanhScale

PICTURE = Path(__file__).parent / "images" / "scale_maps.png"

# Labels, maps and line styles; the two that the builders choose by depth are drawn thick.
MAPS = [
    ("ExpScale()", ExpScale(), {"color": "0.6"}),
    ("AdditiveScale()", AdditiveScale(), {"color": "0.6", "linestyle": ":"}),
    ("SoftplusScale()", SoftplusScale(), {"color": "tab:green"}),
    ("SigmoidScale()", SigmoidScale(), {"color": "tab:red"}),
    ("TanhScale(2)", TanhScale(2.0), {"color": "tab:purple"}),
    ("AtanScale(2, 1): up to 16 layers", AtanScale(2.0, 1.0), {"color": "tab:blue", "linewidth": 2.5}),
    ("AtanScale(0.5, 0.5): 64 layers", AtanScale(0.5, 0.5), {"color": "tab:orange", "linewidth": 2.5}),
]


def draw() -> None:
    raw = torch.linspace(-8.0, 8.0, 801, requires_grad=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, scale, style in MAPS:
        log_scale = scale(raw)
        slope = torch.zeros_like(raw)
        if scale.uses_raw:
            (slope,) = torch.autograd.grad(log_scale.sum(), raw)
        left.plot(raw.detach(), log_scale.detach(), label=label, **style)
        right.plot(raw.detach(), slope, **style)
    left.set(xlabel="raw", ylabel="log_scale", ylim=(-4.2, 3.2), title="Scale maps")
    right.set(xlabel="raw", ylabel="d log_scale / d raw", ylim=(-0.05, 1.1), title="Their slopes: what training feels")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.axvline(0.0, color="0.85", linewidth=0.8, zorder=0)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    draw()
