"""The surrogate of the melt workflow: what the runs so far say about the temperatures between.

A Gaussian process with one smooth kernel is a poor model of a first-order transition: it rings
at the jump and learns nothing from the straight branches on either side. Here the process gets,
beside the temperature T, the liquid fraction s = 1 / (1 + exp((T_m - T) / w)) as an input: a
straight line per phase, a jump between them, and a small smooth residual. Where the jump lies
(T_m) and how wide it is (w; a finite box in a finite time smears it) is not known, so the
processes of many (T_m, w) are averaged, each weighted by its marginal likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from simulation import Observation
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct


@dataclass(frozen=True)
class Surrogate:
    """Gaussian processes over the temperature, one for each place and width of the jump.

    Attributes:
        low, high: the range of the temperatures, scaled to 0 and 1 for the processes.
        scale: the spread of the data, 1 for the processes.
        jumps: T_m and w of each process, of shape (processes, 2).
        weights: the probability of each process, given the data.
    """

    low: float
    high: float
    scale: float
    jumps: NDArray[np.float64]
    weights: NDArray[np.float64]
    processes: list[GaussianProcessRegressor]

    def liquid_fraction(self, temperatures: ArrayLike) -> NDArray[np.float64]:
        """Expected liquid fraction at each temperature, from 0 to 1 and never falling."""
        fractions = np.array([_fraction(temperatures, *jump) for jump in self.jumps])
        return np.asarray(self.weights @ fractions)

    def melting_temperature(self) -> tuple[float, float]:
        """Mean and standard deviation of T_m over the processes."""
        mean = self.weights @ self.jumps[:, 0]
        return float(mean), float(np.sqrt(self.weights @ (self.jumps[:, 0] - mean) ** 2))

    def predict(self, temperatures: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of what a run at each temperature will give."""
        means, variances = [], []
        for process, jump in zip(self.processes, self.jumps, strict=True):
            inputs = _inputs(temperatures, self.low, self.high, *jump)
            mean, deviation = process.predict(inputs, return_std=True)
            means.append(mean)
            variances.append(deviation**2 + (self.scale * _unfinished(inputs)) ** 2)
        mean = self.weights @ means
        between = (np.array(means) - mean) ** 2
        return mean, np.sqrt(self.weights @ (variances + between))


def fit(temperatures: ArrayLike, values: ArrayLike, errors: ArrayLike) -> Surrogate:
    """Return the surrogate of `values` with standard `errors` at three or more `temperatures`."""
    x, y = np.asarray(temperatures, float), np.asarray(values, float)
    low, high, scale = float(x.min()), float(x.max()), float(y.std())
    # In units of the spread of the data: slopes and jump up to a few, a residual of a few per
    # cent over a third of the range. Errors have a floor, as no block average knows its own bias.
    residual = RBF([0.3, 1e6, 1e6], "fixed")  # along the first input only
    kernel = ConstantKernel(4.0) * DotProduct() + ConstantKernel(0.05**2) * residual
    noise = np.maximum(np.asarray(errors, float) / scale, 0.01)
    jumps = [
        (melting, width)
        for melting in np.linspace(low, high, 176)
        for width in (high - low) * np.array([0.003, 0.006, 0.012, 0.024])
    ]
    processes = []
    for jump in jumps:
        inputs = _inputs(x, low, high, *jump)
        variance = noise**2 + _unfinished(inputs) ** 2
        process = GaussianProcessRegressor(kernel, alpha=variance, optimizer=None, normalize_y=True)
        processes.append(process.fit(inputs, y))
    likelihood = np.array([process.log_marginal_likelihood_value_ for process in processes])
    weights = np.exp(likelihood - likelihood.max())
    kept = np.flatnonzero(weights > 1e-3)  # the rest changes no digit of the result
    return Surrogate(
        low,
        high,
        scale,
        np.array(jumps)[kept],
        weights[kept] / weights[kept].sum(),
        [processes[i] for i in kept],
    )


def fit_quantity(observations: Sequence[Observation], quantity: str) -> Surrogate:
    """Return the surrogate of a quantity of the runs: `"energy"`, `"diffusion"`, ..."""
    return fit(
        [o.temperature for o in observations],
        [getattr(o, quantity) for o in observations],
        [getattr(o, f"{quantity}_error") for o in observations],
    )


def choose_temperatures(count: int, observations: Sequence[Observation]) -> list[float]:
    """Return the `count` temperatures whose runs tell most about where it melts.

    They are where the expected liquid fraction passes the middles of `count` equal parts of its
    way from 0 to 1: the sharper the signature is known, the closer together they are. One run at
    each leaves a `count`-th of the doubt.

    Returns:
        Temperatures in ascending order, rounded to 0.001, none of them within 0.0025 of another
        or of one that was observed; fewer than `count` where there is no more room for them.
    """
    known = sorted(o.temperature for o in observations)
    surrogate = fit_quantity(observations, "energy")
    grid = np.round(np.arange(known[0], known[-1], 0.001), 3)
    fraction = surrogate.liquid_fraction(grid)
    chosen: list[float] = []
    for part in range(count):
        taken = np.array(known + chosen)
        free = np.abs(grid[:, None] - taken).min(axis=1) > 0.0025
        if not free.any():
            break
        wanted = fraction[0] + (fraction[-1] - fraction[0]) * (part + 0.5) / count
        chosen.append(float(grid[free][np.abs(fraction[free] - wanted).argmin()]))
    return sorted(chosen)


def melting_bracket(observations: Sequence[Observation]) -> tuple[float, float] | None:
    """Return the temperatures of the hottest run that froze and of the coldest that melted.

    Returns:
        None where the runs do not enclose the transition, or contradict each other.
    """
    solid = [o.temperature for o in observations if o.phase == "solid"]
    liquid = [o.temperature for o in observations if o.phase == "liquid"]
    if not solid or not liquid or max(solid) >= min(liquid):
        return None
    return max(solid), min(liquid)


def _fraction(temperatures: ArrayLike, melting: float, width: float) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh((np.asarray(temperatures, float) - melting) / (2 * width)))


def _inputs(
    temperatures: ArrayLike, low: float, high: float, melting: float, width: float
) -> NDArray[np.float64]:
    scaled = (np.asarray(temperatures, float) - low) / (high - low)
    fraction = _fraction(temperatures, melting, width)
    return np.column_stack([scaled, fraction, scaled * fraction])


def _unfinished(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation, in units of the spread, of what a run within the jump happens to give.

    So near the melting temperature a run is too short to finish: the liquid fraction at which it
    stops is an accident. At half way this is a quarter of the jump, which is about twice the
    spread; in the branches it is nothing.
    """
    fraction = inputs[:, 1]
    return 2 * fraction * (1 - fraction)
