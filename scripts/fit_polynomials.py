"""Fits the polynomials of GPU kernels: `python scripts/fit_polynomials.py [--check]`.

With `u = sqrt(1 - cosine)` it writes, for each exponent, the polynomial h whose square is closest
to the collision probability `(1 - arccos(cosine) / pi) ** exponent`, and how close that is.
"""

import dataclasses
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
# Of each table: the least degree with this error is taken, else the last.
TABLES = {"TABLE": (5e-4, range(5, 8)), "COARSE_TABLE": (2e-3, range(3, 8))}
# An error is relative to the probability plus this: smaller weights need not be as accurate.
FLOOR = 1e-6
# Below, powers of p that are no multiples of 4 have a singular end, which no polynomial follows.
# Such cosines are rare and their weights are the smallest: they take what continues the rest.
LEAST_COSINE = -0.7

HEADER = f'''\
"""Polynomials of collision probabilities; written by `python scripts/fit_polynomials.py`.

By exponent: coefficients of 1, u, u**2 and so on, which are float32 numbers; the largest error for
cosines in [-1, 1]; the largest for cosines >= {LEAST_COSINE}, relative to the
probability + {FLOOR:.0e}.
"""

'''


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the coefficients are kept."""

    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Change nothing; fail if the file is not what this script writes."""
    table: Path = TABLE
    """Module to write."""


def main() -> None:
    """Prints the errors of all degrees that were tried and writes or checks the module."""
    arguments = tyro.cli(Arguments, description=f"Fits polynomials. {cli.EXIT_CODES}")
    new = HEADER + "\n".join(_table(name, *which) for name, which in TABLES.items())
    try:
        old = arguments.table.read_text(encoding="utf-8") if arguments.table.exists() else ""
    except OSError as error:
        raise DataError(f"cannot read {arguments.table}: {error}") from error
    if new == old:
        print(f"{arguments.table} is up to date")
    elif arguments.check:
        raise DataError(f"{arguments.table} differs: run scripts/fit_polynomials.py")
    else:
        write_atomically(arguments.table, new)
        print(f"wrote {arguments.table}")


def _table(name: str, goal: float, degrees: range) -> str:
    text = f"{name}: dict[int, tuple[tuple[float, ...], float, float]] = {{\n"
    for exponent in EXPONENTS:
        for degree in degrees:
            coefficients, error = fit(exponent, degree)
            coefficients = coefficients.astype(np.float32)
            absolute, relative = measure(exponent, coefficients)
            print(
                f"exponent {exponent}, degree {degree}: best {error:.1e}, as float32 "
                f"{relative:.1e}, anywhere {absolute:.1e}"
            )
            if error < goal:
                break
        text += _entry(exponent, coefficients, absolute, relative)
    return text + "}\n"


def fit(exponent: int, degree: int) -> tuple[np.ndarray, float]:
    """The polynomial with the least largest error, by Remez exchange.

    Args:
      exponent: of the probability.
      degree: of the polynomial.

    Returns:
      Float64 coefficients of 1, u, u**2 and so on, and the largest `|h**2 - E| / (E + FLOOR)` for
      cosines of at least `LEAST_COSINE`.
    """
    # Denser at both ends, as the extrema of the error are.
    grid = (1 - np.cos(np.linspace(0, np.pi, 2001))) / 2
    u = math.sqrt(1 - LEAST_COSINE) * grid
    exact = probability(1 - u * u, exponent)
    scale = exact + FLOOR
    powers = u[:, None] ** np.arange(degree + 1)
    # The error of the best polynomial is +-largest, in turns, at degree + 2 places.
    places = np.rint(np.linspace(0, np.pi, degree + 2) / np.pi * (len(u) - 1)).astype(int)
    signs = (-1.0) ** np.arange(degree + 2)
    largest = 0.0
    for _ in range(100):
        # h = sqrt(E + sign * largest * scale) there, linear in h, and by Newton's rule in largest.
        square = exact[places] + signs * largest * scale[places]
        root = np.sqrt(np.maximum(np.abs(square), exact[places] / 100))
        slope = signs * scale[places] / (2 * root)
        system = np.column_stack([powers[places], -slope])
        *coefficients, largest = np.linalg.solve(system, np.sign(square) * root - slope * largest)
        h = powers @ np.array(coefficients)
        error = (h * np.abs(h) - exact) / scale
        if np.abs(error).max() <= abs(largest) * (1 + 1e-6):
            return np.array(coefficients), abs(float(largest))
        places = _alternating_extrema(error, degree + 2)
        signs, largest = np.sign(error[places]), abs(largest)
    raise ArithmeticError(f"exponent {exponent}, degree {degree}: Remez exchange does not converge")


def _alternating_extrema(error: np.ndarray, count: int) -> np.ndarray:
    """Places of so many extrema of alternating sign, without the smaller ones at the ends."""
    runs = np.split(np.arange(len(error)), np.flatnonzero(np.diff(np.sign(error))) + 1)
    extrema = [run[np.argmax(np.abs(error[run]))] for run in runs]
    while len(extrema) > count:
        del extrema[0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1]
    return np.array(extrema)


def probability(cosine: np.ndarray, exponent: int) -> np.ndarray:
    """`(1 - arccos(cosine) / pi) ** exponent`, accurate also where it is small."""
    return (np.arccos(-cosine) / np.pi) ** exponent


def measure(exponent: int, coefficients: np.ndarray) -> tuple[float, float]:
    """The largest errors of a polynomial as kernels evaluate it.

    Args:
      exponent: of the probability.
      coefficients: of 1, u, u**2 and so on; float32.

    Returns:
      The largest `|h**2 - E|` for cosines in [-1, 1], and the largest `|h**2 - E| / (E + FLOOR)`
      for those of at least `LEAST_COSINE`.
    """
    near_one = np.geomspace(1e-7, 0.1, 10_000)
    cosine = np.concatenate([np.linspace(-1, 1, 200_001), 1 - near_one, near_one - 1])
    cosine = cosine.astype(np.float32)
    exact = probability(cosine.astype(np.float64), exponent)
    error = np.abs(evaluate(coefficients, cosine) - exact)
    return error.max(), (error / (exact + FLOOR))[cosine >= LEAST_COSINE].max()


def evaluate(coefficients: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """`h(sqrt(|1 - cosine|)) ** 2` in float32, by Horner's rule with fused multiply-adds."""
    u = np.sqrt(np.abs(np.float32(1) - cosine))
    h = np.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        # In float64 the product is exact.
        h = (h.astype(np.float64) * u + np.float64(coefficient)).astype(np.float32)
    return h * h


def _entry(exponent: int, coefficients: np.ndarray, absolute: float, relative: float) -> str:
    lines = [f"{' ' * 12}{float(coefficient)!r},\n" for coefficient in coefficients]
    errors = [f"{' ' * 8}{_round_up(error)!r},\n" for error in (absolute, relative)]
    return "".join([f"    {exponent}: (\n        (\n", *lines, "        ),\n", *errors, "    ),\n"])


def _round_up(error: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return float(f"{math.ceil(error / unit) * unit:.1e}")


if __name__ == "__main__":
    cli.run(main)
