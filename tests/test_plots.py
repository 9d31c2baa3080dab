"""The pictures: do they show the numbers they are given, and say what they show?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from pyro_affine.inference_data import inference_data
from pyro_affine.plots import _density, plot_pairs, plot_weights
from pyro_affine.psis_result import PSISResult


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def some_draws(num_draws: int = 400, shift: float = 0.0) -> dict[str, torch.Tensor]:
    mu = torch.randn(num_draws) + shift
    return {"mu": mu, "tau": torch.rand(num_draws), "theta": mu[:, None] + torch.randn(num_draws, 3)}


def visible(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


def names(figure: Any) -> list[str]:
    return [axes.get_xlabel() for axes in visible(figure) if axes.get_xlabel()]


def legend(figure: Any) -> list[str]:
    (found,) = figure.legends
    return [found.get_title().get_text(), *(text.get_text() for text in found.get_texts())]


def test_pairs_show_all_entries_below_the_diagonal() -> None:
    figure = plot_pairs(some_draws())
    assert names(figure) == ["mu", "tau", "theta[0]", "theta[1]", "theta[2]"]
    assert len(visible(figure)) == 5 + 5 * 4 // 2
    left = [axes.get_ylabel() for axes in visible(figure) if axes.get_ylabel()]
    assert left == names(figure)[1:]


def test_pairs_can_be_fewer_and_say_so() -> None:
    figure = plot_pairs(some_draws(), sites=["theta", "mu"], max_entries=2)
    assert names(figure) == ["theta[0]", "theta[1]"]
    assert "first 2 of 4 entries" in legend(figure)[0]
    assert "first" not in legend(plot_pairs(some_draws()))[0]


def test_pairs_lay_the_reference_over_the_draws() -> None:
    figure = plot_pairs(some_draws(), some_draws(300, shift=1.0), labels=("flow", "NUTS"))
    assert legend(figure)[1:] == ["flow (400)", "NUTS (300)"]
    flow, nuts = visible(figure)[0].lines
    assert nuts.get_xdata()[nuts.get_ydata().argmax()] > flow.get_xdata()[flow.get_ydata().argmax()] + 0.3


def test_dots_of_a_pair_are_the_draws() -> None:
    draws = some_draws(200)
    dots = visible(plot_pairs(draws, sites=["mu", "tau"]))[1].lines[0]
    assert np.allclose(dots.get_xdata(), draws["mu"]) and np.allclose(dots.get_ydata(), draws["tau"])


def test_contours_hold_the_share_of_draws_that_they_say() -> None:
    draws = {"a": torch.randn(20_000)}
    draws["b"] = draws["a"].square() + torch.randn(20_000)
    axes = visible(plot_pairs(draws))[1]
    (contours,) = axes.collections
    for path, share in zip(contours.get_paths(), (0.9, 0.5), strict=True):
        inside = path.contains_points(torch.stack([draws["a"], draws["b"]], dim=1).numpy())
        assert inside.mean() == pytest.approx(share, abs=0.04)


def test_density_is_that_of_the_draws() -> None:
    draws = np.random.default_rng(0).normal(size=(50_000, 1))
    (centres,), mass = _density(draws, [(-3.0, 3.0)])
    exact = np.exp(-0.5 * centres**2)
    assert np.abs(mass / mass.max() - exact).max() < 0.05
    assert mass.sum() == pytest.approx(1)


def test_axes_end_where_the_draws_do() -> None:
    draws = {"positive": torch.rand(1000) ** 2, "heavy": torch.randn(1000) / torch.rand(1000)}
    positive, _, heavy = visible(plot_pairs(draws))
    assert positive.get_xlim()[0] == pytest.approx(draws["positive"].min().item())
    assert heavy.get_xlim()[1] < draws["heavy"].max()  # one far draw does not flatten the rest


INPUTS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: {name: value.numpy() for name, value in some_draws().items()},
    "with gradients": lambda: {name: value.requires_grad_() for name, value in some_draws().items()},
    "constant entry": lambda: some_draws() | {"tau": torch.ones(400)},
    "integers": lambda: some_draws() | {"tau": torch.arange(400)},
    "a draw that is not finite": lambda: some_draws() | {"tau": torch.cat([torch.rand(399), torch.tensor([math.nan])])},
    "arviz": lambda: inference_data(
        {"posterior": {name: value.reshape(2, 200, *value.shape[1:]).numpy() for name, value in some_draws().items()}}
    ),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.filterwarnings("error")
def test_pairs_take_draws_of_any_kind(make: Callable[[], Any], tmp_path: Path) -> None:
    figure = plot_pairs(make(), some_draws(), sites=["tau", "mu"], path=tmp_path / "pairs.png")
    assert names(figure) == ["tau", "mu"]
    assert legend(figure)[1] == "draws (400)"


def test_one_entry_alone() -> None:
    figure = plot_pairs({"z": torch.randn(100)})
    assert names(figure) == ["z"] and "contours" not in legend(figure)[0]


def weighted(log_weights: torch.Tensor) -> PSISResult:
    return PSISResult({"z": torch.randn(len(log_weights))}, log_weights.double())


def test_weights_are_sorted_and_in_units_of_their_mean() -> None:
    result = weighted(torch.randn(2000))
    (axes,) = plot_weights(result).axes
    raw, smoothed, tail, equal = axes.lines
    assert np.allclose(smoothed.get_ydata(), np.sort(result.smoothed_log_weights.exp().numpy())[::-1] * 2000)
    assert smoothed.get_ydata().mean() == pytest.approx(1)
    assert np.allclose(raw.get_ydata()[135:], smoothed.get_ydata()[135:])  # 135 = 3 sqrt(2000), the tail
    assert not np.allclose(raw.get_ydata()[:135], smoothed.get_ydata()[:135])
    assert np.array_equal(tail.get_ydata(), smoothed.get_ydata()[:135])
    assert set(equal.get_ydata()) == {1}


def test_title_holds_the_verdict_in_numbers() -> None:
    result = weighted(torch.randn(2000))
    (axes,) = plot_weights(result).axes
    expected = f"k-hat {result.khat:.2f} (good below {result.threshold:.2f}), ESS {result.ess:.0f} of 2000 draws"
    assert axes.get_title() == expected


WEIGHTS: dict[str, tuple[torch.Tensor, list[str]]] = {
    "equal": (torch.zeros(100), ["raw weights", "smoothed weights", "equal weights"]),
    "nearly equal": (
        1e-3 * torch.arange(100),
        ["raw weights", "smoothed weights", "Pareto tail, 20 draws", "equal weights"],
    ),
    "some zero": (
        torch.cat([torch.arange(80) / 80, torch.full((20,), -math.inf)]),
        ["raw weights, 20 of weight 0 not shown", "smoothed weights", "Pareto tail, 20 draws", "equal weights"],
    ),
    "one carries all": (
        torch.cat([torch.zeros(99), torch.tensor([800.0])]),
        ["raw weights, 99 of weight 0 not shown", "smoothed weights", "equal weights"],
    ),
}


@pytest.mark.parametrize(("log_weights", "labels"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.filterwarnings("error")
def test_weights_of_any_kind(log_weights: torch.Tensor, labels: list[str], tmp_path: Path) -> None:
    (axes,) = plot_weights(weighted(log_weights), path=tmp_path / "weights.png").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    low, high = axes.get_ylim()
    assert low <= 0.1 and high >= 10  # weights that are nearly equal look nearly equal


PICTURES: dict[str, Callable[[Path], Any]] = {
    "pairs": lambda path: plot_pairs(some_draws(), some_draws(), max_entries=3, path=path),
    "weights": lambda path: plot_weights(weighted(torch.randn(500)), path=path),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_are_saved_by_name_in_few_colours(draw: Callable[[Path], Any], tmp_path: Path) -> None:
    figure = draw(tmp_path / "picture.png")
    image = imread(tmp_path / "picture.png")
    assert image.shape[0] > 400 and image.std() > 0.01
    lines = [line for axes in visible(figure) for line in axes.lines]
    assert len({to_hex(line.get_color()) for line in lines}) <= 4


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown site": (lambda: plot_pairs(some_draws(), sites=["nu"]), r"among \['mu', 'tau', 'theta'\], got \['nu'\]"),
    "site missing in the reference": (lambda: plot_pairs(some_draws(), {"mu": torch.randn(10)}), "sites must be among"),
    "another shape in the reference": (
        lambda: plot_pairs(some_draws(), some_draws() | {"theta": torch.randn(400, 2)}),
        "entries of the draws",
    ),
    "no entries": (lambda: plot_pairs({}), "an entry to show"),
    "room for none": (lambda: plot_pairs(some_draws(), max_entries=0), "an entry to show"),
    "draws that differ in number": (lambda: plot_pairs(some_draws() | {"mu": torch.randn(10)}), "number of draws"),
    "no finite draw": (lambda: plot_pairs({"mu": torch.full((10,), math.nan)}), "finite"),
}


@pytest.mark.parametrize(("misuse", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_told_in_words(misuse: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        misuse()
