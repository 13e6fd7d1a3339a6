"""The package as a whole: light to import, whole when built, free of what it must not use."""

import ast
import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import yoso_jax

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for path in (ROOT / "yoso_jax").rglob("*") if path.suffix in {".py", ".typed"}
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_starts_no_backend():
    # JAX looks for this platform when a backend is first used, and only then.
    nowhere = {"JAX_PLATFORMS": "no_such_platform"}
    assert "no_such_platform" in run_python("import jax; jax.devices()", **nowhere).stderr
    result = run_python("import yoso_jax", **nowhere)
    assert result.returncode == 0, result.stderr


def test_import_is_light():
    heavy = ("grain", "matplotlib", "orbax", "tensorflow", "tokenizers", "torch", "tyro")
    result = run_python(f"import sys, yoso_jax; print(*{{*{heavy}}}.intersection(sys.modules))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="the build backend, which extra `test` installs")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes beside what it builds
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "yoso_jax", source / "yoso_jax", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"yoso_jax/__init__.py", "yoso_jax/py.typed"} <= expected
    assert expected == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "yoso-jax"
    assert metadata["Version"] == yoso_jax.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert yoso_jax.__version__ == project["version"]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        # Pallas' Triton backend is no longer developed; PyTorch is for comparison only.
        ("yoso_jax", {"triton", "jax_triton", "torch", "transformers"}),
        ("scripts", {"triton", "jax_triton"}),
        ("tests", {"triton", "jax_triton"}),
        ("benchmarks", {"triton", "jax_triton"}),
    ],
)
def test_forbidden_imports(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        for module in imported_modules(path):
            assert not forbidden.intersection(module.split(".")), f"{path} imports {module}"


def test_compiler_options_are_known_to_this_xla():
    import jax

    from yoso_jax.compiling import compiler_options

    assert compiler_options("cpu") == {}
    assert jax.jit(lambda x: x + 1, compiler_options=compiler_options("gpu"))(1) == 2
