"""What benchmarks have in common: their options, and the cases they consist of."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax

from yoso_jax.benchmarking.measure import measure
from yoso_jax.benchmarking.report import Row
from yoso_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be: what identifies it, and what to time."""

    row: Row
    function: Callable[..., Any]
    make_inputs: Callable[[int], tuple]
    derive: Callable[[Row], Row] = lambda row: {}
    """Further fields from the measured row."""


@dataclasses.dataclass(frozen=True)
class Rival:
    """One row to be, of what JAX does not run."""

    row: Row
    measure: Callable[[float], Row]
    """From about how long to time it to the fields of `Measurement`, as far as there are any."""
    derive: Callable[[Row], Row] = lambda row: {}
    """Further fields from the measured row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What all benchmarks take. Defaults are smaller on a CPU."""

    large_n: ClassVar[tuple[int, ...]] = (1024, 2048, 4096, 16384, 65536)
    small_n: ClassVar[tuple[int, ...]] = (256, 512)
    large_tokens: ClassVar[int] = 2**18
    small_tokens: ClassVar[int] = 2**12

    n: tuple[int, ...] = ()
    """Tokens of a sequence; the default depends on the platform."""
    m: tuple[int, ...] = (32, 64)
    """Numbers of hashes."""
    tokens: int | None = None
    """Of all sequences (and heads) together, rounded down to whole ones."""
    hash_code_len: int = 9
    """Bits of a hash."""
    seconds: float = 1.0
    """About how long to time each."""
    json: Path | None = None
    """Report to write; an old one is replaced."""
    plot: Path | None = None
    """Picture to draw: time and memory against n."""

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if any(x < 1 for x in value):
                raise ConfigError(f"--{name} must be >= 1, got {' '.join(map(str, value))}")
        if not self.m:
            raise ConfigError("--m must have at least one number")
        if not 1 <= self.hash_code_len <= 16:
            raise ConfigError(f"--hash-code-len must be in 1..16, got {self.hash_code_len}")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"--seconds must be > 0, got {self.seconds}")
        if self.tokens is not None and self.tokens < max(self.n, default=1):
            raise ConfigError(f"--tokens must be at least --n, got {self.tokens}")

    def resolve(self) -> "Benchmark":
        """With defaults for the platform."""
        large = jax.default_backend() == "gpu"
        n = self.n or (self.large_n if large else self.small_n)
        tokens = self.tokens or max(self.large_tokens if large else self.small_tokens, *n)
        if not self.n:
            n = tuple(x for x in n if x <= tokens) or (tokens,)
        return dataclasses.replace(self, n=n, tokens=tokens)

    def cases(self) -> Iterator[Case | Rival]:
        """What to time, in order."""
        raise NotImplementedError


def run_case(case: Case | Rival, seconds: float) -> Row:
    """The row, with times or with the reason why there are none."""
    try:
        if isinstance(case, Rival):
            measured = case.row | case.measure(seconds)
        else:
            measured = case.row | measure(case.function, case.make_inputs, seconds=seconds).row()
    # Whatever goes wrong, the other rows are worth having.
    except Exception as error:
        return case.row | {"reason": _explain(error)}
    return measured | case.derive(measured)


def _explain(error: BaseException) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).strip().splitlines() or [""]
    known = isinstance(error, NotImplementedError)
    return lines[0] if known and lines[0] else f"{type(error).__name__}: {lines[0]}"
