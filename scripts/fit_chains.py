"""Fits the chains of GPU kernels: `python scripts/fit_chains.py [--check]`.

For each exponent it writes the chain of multiply-adds (`yoso_jax.kernels.mosaic_gpu.
collision_chain`) whose end is closest to the collision probability
`(1 - arccos(cosine) / pi) ** exponent`, and how close that is: the shortest one that is close
enough, of all in which the last step is a square. Ten minutes on one core.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import tyro

from yoso_jax import cli
from yoso_jax.errors import DataError
from yoso_jax.metrics import write_atomically

TABLE = (
    Path(__file__).parents[1] / "yoso_jax" / "kernels" / "mosaic_gpu" / "collision_coefficients.py"
)
EXPONENTS = range(1, 17)
STEPS = range(3, 6)
# The least number of steps with this error is taken, else the best of all.
GOAL = 1.1e-3
# An error is relative to the probability plus the smaller of these, of which the second is a part
# of the weight of cosine 0: smaller weights need not be as accurate.
FLOOR, FLOOR_PART = 1e-6, 1e-3
# Below, powers of p that are no multiples of 4 have a singular end, which no polynomial follows.
# Such cosines are rare and their weights are the smallest: they take what continues the rest, if it
# is off by less than 2 % of the weight of cosine 0; more for the least exponents.
LEAST_COSINE = -0.7
LARGER = {1: 0.25, 2: 0.04}
# Random starts of a search, and places where the error is looked at.
_STARTS, _PLACES = 3000, 160

HEADER = f'''\
"""Chains of collision probabilities; written by `python scripts/fit_chains.py`.

By exponent: slope and start of the first term; of each further one the term that is multiplied
with the one before, and what is added, all float32 numbers; the largest error for cosines in
[-1, 1]; the largest for cosines >= {LEAST_COSINE}, relative to the probability + {FLOOR:.0e},
or + {FLOOR_PART} * 2 ** -exponent if that is less.
"""

'''
TYPE = "TABLE: dict[int, tuple[float, float, tuple[tuple[int, float], ...], float, float]]"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the chains are kept."""

    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Change nothing; fail if the file is not what this script writes."""
    table: Path = TABLE
    """Module to write."""


def main() -> None:
    """Prints the errors of all lengths that were tried and writes or checks the module."""
    arguments = tyro.cli(Arguments, description=f"Fits chains. {cli.EXIT_CODES}")
    new = f"{HEADER}{TYPE} = {{\n{''.join(map(_entry, EXPONENTS))}}}\n"
    try:
        old = arguments.table.read_text(encoding="utf-8") if arguments.table.exists() else ""
    except OSError as error:
        raise DataError(f"cannot read {arguments.table}: {error}") from error
    if new == old:
        print(f"{arguments.table} is up to date")
    elif arguments.check:
        raise DataError(f"{arguments.table} differs: run scripts/fit_chains.py")
    else:
        write_atomically(arguments.table, new)
        print(f"wrote {arguments.table}")


def _entry(exponent: int) -> str:
    best: tuple[float, float, tuple[int, ...], np.ndarray] | None = None
    for steps in STEPS:
        # The last one is a square: it cannot be negative, and halves what the others must reach.
        for middle in itertools.product(*map(range, range(2, steps))):
            factors = (0, *middle, steps - 1)
            for numbers in fit(exponent, factors).astype(np.float32):
                absolute, relative, low = measure(exponent, factors, numbers)
                is_usable = low <= LARGER.get(exponent, 2e-2) * 2.0**-exponent
                if is_usable and (best is None or relative < best[0]):
                    best = relative, absolute, factors, numbers
        if best is not None:
            print(f"exponent {exponent}, {steps} steps: {best[0]:.1e}, anywhere {best[1]:.1e}")
            if best[0] <= GOAL:
                break
    assert best is not None
    relative, absolute, factors, numbers = best
    slope, start, *constants = map(float, numbers)
    chain = "".join(
        f"            ({factor}, {constant!r}),\n"
        for factor, constant in zip(factors, constants, strict=True)
    )
    return (
        f"    {exponent}: (\n        {slope!r},\n        {start!r},\n        (\n{chain}        ),\n"
        f"        {_round_up(absolute)!r},\n        {_round_up(relative)!r},\n    ),\n"
    )


def fit(exponent: int, factors: tuple[int, ...]) -> np.ndarray:
    """Slope, start and constants of some chains with about the least largest error.

    Least squares from random starts (Levenberg and Marquardt), then with weights that grow where
    the error is large (Lawson).

    Args:
      exponent: of the probability.
      factors: of each step.
    """
    # Denser at both ends, as the extrema of the error are.
    grid = (1 - np.cos(np.linspace(0, np.pi, _PLACES))) / 2
    u = math.sqrt(1 - LEAST_COSINE) * grid
    exact = probability(1 - u * u, exponent)
    scale = 1 / (exact + floor(exponent))
    rng = np.random.default_rng(exponent)
    numbers = rng.normal(size=(_STARTS, len(factors) + 2))
    some = slice(None, None, 4)
    numbers, costs = _least_squares(numbers, u[some], exact[some], scale[some], factors, 20)
    numbers, costs = _least_squares(numbers[np.argsort(costs)[:40]], u, exact, scale, factors, 80)
    numbers = best = numbers[np.argsort(costs)[:6]]
    weights = np.ones((len(numbers), _PLACES))
    least = np.full(len(numbers), np.inf)
    for _ in range(40):
        numbers, _ = _least_squares(numbers, u, exact, scale * weights, factors, 12)
        error = np.abs(_run(numbers, u, factors)[0] - exact) * scale
        largest = error.max(axis=1)
        best = np.where((largest < least)[:, None], numbers, best)
        least = np.minimum(largest, least)
        weights = weights * np.sqrt(error / largest[:, None] + 0.02)
        weights = weights / weights.mean(axis=1, keepdims=True)
    return best


def _run(
    numbers: np.ndarray, u: np.ndarray, factors: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of chains `[starts, places]`, and derivatives `[starts, numbers, places]`."""
    terms = [numbers[:, :1] * u + numbers[:, 1:2]]
    slopes = np.zeros((*numbers.shape, len(u)))
    slopes[:, 0], slopes[:, 1] = u, 1
    derivatives = [slopes]
    for i, factor in enumerate(factors):
        derivative = (
            derivatives[-1] * terms[factor][:, None] + derivatives[factor] * terms[-1][:, None]
        )
        derivative[:, i + 2] += 1
        terms.append(terms[-1] * terms[factor] + numbers[:, i + 2, None])
        derivatives.append(derivative)
    return terms[-1], derivatives[-1]


def _least_squares(
    numbers: np.ndarray,
    u: np.ndarray,
    exact: np.ndarray,
    weights: np.ndarray,
    factors: tuple[int, ...],
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Better numbers for each start, and their sums of squares."""

    def residuals(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        end, derivative = _run(numbers, u, factors)
        # Far away from any solution terms overflow.
        residual = np.nan_to_num((end - exact) * weights, nan=1e9, posinf=1e9, neginf=-1e9)
        jacobian = np.nan_to_num(derivative * np.expand_dims(weights, -2), posinf=1e9, neginf=-1e9)
        return residual, np.clip(jacobian, -1e9, 1e9), np.sum(residual**2, axis=1)

    damping = np.full(len(numbers), 1e-2)
    with np.errstate(all="ignore"):
        residual, jacobian, costs = residuals(numbers)
        for _ in range(iterations):
            square = np.einsum("skn,sln->skl", jacobian, jacobian)
            diagonal = np.einsum("skk->sk", square) * damping[:, None] + 1e-12
            square = square + diagonal[:, None] * np.eye(diagonal.shape[1])
            slope = np.einsum("skn,sn->sk", jacobian, residual)
            tried = numbers - np.linalg.solve(square, slope[..., None])[..., 0]
            new_residual, new_jacobian, new_costs = residuals(tried)
            is_better = new_costs < costs
            numbers = np.where(is_better[:, None], tried, numbers)
            residual = np.where(is_better[:, None], new_residual, residual)
            jacobian = np.where(is_better[:, None, None], new_jacobian, jacobian)
            costs = np.where(is_better, new_costs, costs)
            damping = np.where(is_better, damping * 0.3, damping * 4)
    return numbers, costs


def floor(exponent: int) -> float:
    """What errors of small probabilities are compared with."""
    return min(FLOOR, FLOOR_PART * 2.0**-exponent)


def probability(cosine: np.ndarray, exponent: int) -> np.ndarray:
    """`(1 - arccos(cosine) / pi) ** exponent`, accurate also where it is small."""
    return (np.arccos(-cosine) / np.pi) ** exponent


def measure(
    exponent: int, factors: tuple[int, ...], numbers: np.ndarray
) -> tuple[float, float, float]:
    """The largest errors of a chain as kernels evaluate it.

    Args:
      exponent: of the probability.
      factors: of each step.
      numbers: slope, start and constants; float32.

    Returns:
      The largest error for cosines in [-1, 1], the largest divided by `E + floor` for those of at
      least `LEAST_COSINE`, and the largest for the others.
    """
    near_one = np.geomspace(1e-7, 0.1, 10_000)
    cosine = np.concatenate([np.linspace(-1, 1, 200_001), 1 - near_one, near_one - 1])
    cosine = cosine.astype(np.float32)
    exact = probability(cosine.astype(np.float64), exponent)
    error = np.abs(evaluate(factors, numbers, cosine) - exact)
    is_usual = cosine >= LEAST_COSINE
    return error.max(), (error / (exact + floor(exponent)))[is_usual].max(), error[~is_usual].max()


def evaluate(factors: tuple[int, ...], numbers: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """The end of a chain in float32, with fused multiply-adds."""
    u = np.sqrt(np.abs(np.float32(1) - cosine))

    def fused(x: np.ndarray, y: np.ndarray | np.float32, constant: np.float32) -> np.ndarray:
        # In float64 the product is exact.
        return (x.astype(np.float64) * y + np.float64(constant)).astype(np.float32)

    terms = [fused(u, numbers[0], numbers[1])]
    for factor, constant in zip(factors, numbers[2:], strict=True):
        terms.append(fused(terms[-1], terms[factor], constant))
    return terms[-1]


def _round_up(error: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return float(f"{math.ceil(error / unit) * unit:.1e}")


if __name__ == "__main__":
    cli.run(main)
