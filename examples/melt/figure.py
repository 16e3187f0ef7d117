"""The figure of the melt workflow: energy, diffusion and displacement, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display, no pyplot state
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from simulation import TRIPLE_POINT, Observation
from surrogate import fit_quantity

_ROUNDS = (("o", "tab:blue", "first round (± 2 s.e.)"), ("D", "tab:red", "chosen by the surrogate"))


def draw(
    path: Path, title: str, first: Sequence[Observation], second: Sequence[Observation]
) -> None:
    """Draw what the two rounds of runs observed into the PNG file `path`."""
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    energy = figure.add_subplot(grid[0, 0])
    diffusion = figure.add_subplot(grid[1, 0], sharex=energy)
    displacement = figure.add_subplot(grid[:, 1])

    _against_temperature(energy, "energy", first, second)
    energy.set_ylabel(r"potential energy per atom  $U/N\epsilon$")
    energy.tick_params(labelbottom=False)
    energy.legend(loc="upper left", fontsize="small", frameon=False)
    _against_temperature(diffusion, "diffusion", first, second)
    diffusion.set_ylabel(r"self-diffusion  $D\,/\,\sigma^2\tau^{-1}$")
    diffusion.set_xlabel(r"temperature  $k_BT/\epsilon$")
    _displacements(figure, displacement, [*first, *second])

    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _against_temperature(
    axes: Axes, name: str, first: Sequence[Observation], second: Sequence[Observation]
) -> None:
    both = [*first, *second]
    temperatures = [o.temperature for o in both]
    line = np.linspace(min(temperatures), max(temperatures), 500)
    mean, deviation = fit_quantity(both, name).predict(line)
    axes.fill_between(
        line,
        mean - 2 * deviation,
        mean + 2 * deviation,
        color="0.85",
        lw=0,
        label="± 2 s.d. of a run",
    )
    axes.plot(line, mean, color="0.35", lw=1.2, label="Gaussian process")
    axes.axvline(TRIPLE_POINT, color="black", ls=":", lw=1, label=f"triple point {TRIPLE_POINT}")
    for (marker, color, label), observations in zip(_ROUNDS, (first, second), strict=True):
        axes.errorbar(
            [o.temperature for o in observations],
            [getattr(o, name) for o in observations],
            yerr=[2 * getattr(o, f"{name}_error") for o in observations],
            fmt=marker, color=color, ms=5, capsize=2, lw=1, label=label,
        )  # fmt: skip


def _displacements(figure: Figure, axes: Axes, observations: Sequence[Observation]) -> None:
    temperatures = [o.temperature for o in observations]
    scale, colours = Normalize(min(temperatures), max(temperatures)), colormaps["viridis"]
    for o in observations:
        colour = colours(scale(o.temperature))
        axes.loglog(o.time[1:], o.displacement[1:], color=colour, lw=1.2)
    time = np.array([1.0, max(o.time[-1] for o in observations)])
    guide = 1.6 * max(o.displacement[-1] / o.time[-1] for o in observations) * time
    axes.loglog(time, guide, color="black", ls="--", lw=0.8, label=r"diffusive, $\propto t$")
    axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.set_xticks([0.2, 0.5, 1, 2, 5], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(r"time  $t/\tau$")
    axes.set_ylabel(r"mean squared displacement  $\langle\Delta r^2\rangle/\sigma^2$")
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, label=r"temperature  $k_BT/\epsilon$")
