"""What all tests share: checked shapes and types, the CPU as the platform, test data."""

import functools
import gc
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest
from jaxtyping import install_import_hook

_shapes_checked = jaxtyping.jaxtyped


def _types_checked(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorates like jaxtyping, but with the bare checker where no annotation names a shape.

    Kernels are built by calling millions of such functions, and keeping account of shapes takes
    longer than what they do.
    """

    def decorate(fn: Any) -> Any:
        if not inspect.isfunction(fn) or "jaxtyping" in repr(fn.__annotations__):
            return _shapes_checked(fn, typechecker=typechecker)
        checked = typechecker(fn)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (fn if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

        return call

    return decorate


# Before anything imports yoso_jax: calls with a wrong shape, dtype or type fail.
jaxtyping.jaxtyped = _types_checked  # which the hook decorates with
install_import_hook("yoso_jax", "beartype.beartype")

# Compiling takes longer than Hypothesis' deadline, and a run should be repeatable.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    # JAX reads this when it is first imported, which conftest.py must not do at its top.
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # Threads of XLA, likewise: Pallas' interpreter blocks one for each warpgroup that waits.
        os.environ.setdefault("NPROC", "16")
        # Equal programs compile once, whichever file or script they are of. Each process of
        # pytest has a folder of its own, because JAX does not write into it atomically.
        folder = tempfile.TemporaryDirectory(prefix="compilations-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection_finish() -> None:
    # What was imported stays, so that looking through it for garbage again and again is in vain;
    # and tracing makes objects by the thousand, few of them garbage.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@functools.cache
def _default_backend() -> str:
    import jax

    return jax.default_backend()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and _default_backend() != "gpu":
        pytest.skip(
            "needs a GPU: JAX runs on the "
            f"{_default_backend()} (install with EXTRAS=cuda13 and run pytest -m gpu)"
        )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of small data files beside the tests."""
    return Path(__file__).parent / "data"


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Calls reach the library's own validation, as they do outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
