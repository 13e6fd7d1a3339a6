"""scripts/benchmark.py on small sizes, what it measures with, and the tables in README.md."""

import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import fast_compilations

from yoso_jax.benchmarking.base import Case, run_case
from yoso_jax.benchmarking.measure import measure, sum_kernels
from yoso_jax.benchmarking.operations import Attention, Cumulation, Hash
from yoso_jax.benchmarking.torch_models import MODELS
from yoso_jax.errors import DiskFullError
from yoso_jax.kernels.codes import hash_codes

ROOT = Path(__file__).parents[1]
MEASURED = {
    "wall_ms",
    "device_ms",
    "kernels",
    "temp_bytes",
    "argument_bytes",
    "output_bytes",
    "timed_calls",
}
SMALL = ["--n", 16, "--m", 3, "--tokens", 64, "--hash-code-len", 3, "--seconds", 0.001]
HEADS = [*SMALL, "--head-dim", 16, "--heads-per-sequence", 2]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def compilations() -> Iterator[None]:
    with fast_compilations():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script in this process: exit code, standard output, standard error."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the script's to set
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def benchmark(run: Run, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Runs a benchmark: its report and what it printed."""

    def benchmark(*arguments: object) -> tuple[dict[str, Any], str]:
        path = tmp_path / "results" / "report.json"
        code, out, err = run("benchmark.py", *arguments, "--json", path)
        assert code == 0, err
        return json.loads(path.read_text()), out

    return benchmark


def by_name(report: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = ("implementation", "direction", "n", "m")
    return {tuple(row[x] for x in names if x in row): row for row in report["rows"]}


# Measurements


def test_measurement_of_a_product() -> None:
    numbers = []

    def make_inputs(number: int) -> tuple:
        numbers.append(number)
        return jnp.full((8, 4), float(number)), jnp.ones((4, 2))

    measured = measure(lambda x, y: x @ y, make_inputs, seconds=0.001)
    assert numbers == [*range(len(numbers))]
    assert len(numbers) >= 2
    assert measured.wall_ms > 0
    assert measured.argument_bytes == 4 * (8 * 4 + 4 * 2)
    assert measured.output_bytes == 4 * 8 * 2
    assert measured.timed_calls >= 3
    assert set(measured.row()) == MEASURED
    if jax.default_backend() == "cpu":
        assert measured.device_ms is measured.kernels is None


def test_measurement_on_a_gpu_rotates_inputs_past_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The steps of a GPU, on whatever runs the tests."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("yoso_jax.benchmarking.measure.ROTATED_BYTES", 1000)
    numbers = []

    def make_inputs(number: int) -> tuple:
        numbers.append(number)
        return (jnp.zeros((8, 8)),)

    def sum_kernels(planes: Any, calls: int) -> dict[str, float]:
        assert any("CPU" in plane.name for plane in planes)
        assert calls >= 1
        return {f"kernel_{i}": 10.0 - i for i in range(10)}

    monkeypatch.setattr("yoso_jax.benchmarking.measure.sum_kernels", sum_kernels)
    measured = measure(lambda x: x + 1, make_inputs, seconds=0.001)
    assert numbers == [0, 1, 2, 3]
    assert measured.device_ms == 55
    assert measured.row()["kernels"] == {f"kernel_{i}": 10.0 - i for i in range(8)}


def test_device_time_is_that_of_all_streams() -> None:
    def line(name: str, **kernels: float) -> SimpleNamespace:
        events = [SimpleNamespace(name=k, duration_ns=ns) for k, ns in kernels.items()]
        return SimpleNamespace(name=name, events=events)

    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("python", f=1e9)]),
        SimpleNamespace(
            name="/device:GPU:0",
            lines=[
                line("Stream #13(Compute)", a=2e6, b=6e6),
                line("Stream #14(MemcpyD2D)", copy=1e6),
                line("XLA Modules", module=1e9),
                line("Stream #13(Compute)", a=6e6),
            ],
        ),
    ]
    kernels = sum_kernels(planes, calls=2)
    assert kernels == {"a": 4, "b": 3, "copy": 0.5}
    assert list(kernels) == ["a", "b", "copy"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("no such device.\nAt length."), "no such device."),
        (ValueError("bad shape"), "ValueError: bad shape"),
        (ExceptionGroup("none", [NotImplementedError("not here")]), "not here"),
        (RuntimeError(), "RuntimeError: "),
    ],
    ids=str,
)
def test_what_fails_is_a_row_with_the_reason(error: Exception, reason: str) -> None:
    def function(x: jax.Array) -> jax.Array:
        raise error

    case = Case({"implementation": "this"}, function, lambda number: (jnp.ones(2),))
    assert run_case(case, 0.001) == {"implementation": "this", "reason": reason}


def test_speed_is_beside_cudnn_at_the_same_n() -> None:
    options = Attention(n=(8, 16), m=(3,), tokens=64, implementations=("cudnn", "xla"))
    first, sampled, second, without = options.cases()
    assert first.derive(first.row | {"wall_ms": 6.0, "device_ms": 4.0})["speed_wall"] == 1
    speed = sampled.derive(sampled.row | {"wall_ms": 3.0, "device_ms": 1.0})
    assert speed == {"speed_wall": 2, "speed_device": 4}
    assert second.row["n"] == without.row["n"] == 16
    assert without.derive(without.row | {"wall_ms": 3.0, "device_ms": 1.0}) == {}


def test_floor_of_the_cumulation_and_rate_of_the_hash() -> None:
    (case, *_) = Cumulation(n=(4096,), m=(64,), tokens=4096).cases()
    assert case.row == case.row | {"batch": 1, "heads": 1, "direction": "forward"}
    row = {"wall_ms": 1.0, "device_ms": 0.01, "kernels": {"lsh_cumulation": 0.004, "other": 0.006}}
    derived = case.derive(case.row | row)
    assert derived["floor_ms"] == pytest.approx(2 * 4096 * 64 * 64 * 2 / 31e12 * 1e3)
    assert derived["floor_fraction"] == pytest.approx(derived["floor_ms"] / 0.01)
    assert derived["kernel_floor_fraction"] == pytest.approx(derived["floor_ms"] / 0.004)

    (case, *_) = Hash(n=(1024,), m=(32,), tokens=4096, head_dim=64).cases()
    row = {"wall_ms": 1.0, "device_ms": None, "argument_bytes": 10**6, "output_bytes": 10**6}
    derived = case.derive(case.row | row)
    assert derived["flops"] == 2 * 4096 * 64 * 32 * 9
    assert derived["gb_per_s"] == pytest.approx(2)


def test_sizes_are_rounded_down_to_whole_sequences() -> None:
    options = Attention(n=(100,), tokens=2**12)
    assert options.sizes(100) == {"batch": 5, "heads": 8}
    assert options.sizes(4000) == {"batch": 1, "heads": 1}


def test_padding_is_masked() -> None:
    options = Attention(n=(8,), m=(3,), tokens=16, head_dim=4, mask_fraction=0.25, dtype="float32")
    function = options.function("xla", 8, 3)
    inputs = options.make_inputs("xla", 8, 3, 0)
    assert [x.shape for x in inputs] == [(1, 8, 2, 4)] * 3 + [(1, 2, 4, 27)]
    out = function(*inputs)
    assert not out[:, 6:].any()
    padded = [x.at[:, 6:].set(7.0) for x in inputs[:3]]
    np.testing.assert_array_equal(function(*padded, inputs[3]), out)


def test_alike_tokens_share_a_bucket() -> None:
    options = Attention(n=(32,), m=(3,), tokens=64, head_dim=64, alike=True, dtype="float32")
    query, key, _, projection = options.make_inputs("xla", 32, 3, 0)
    codes = [
        hash_codes(jnp.swapaxes(x, 1, 2), projection, hash_code_len=9)[0, 0] for x in (query, key)
    ]
    assert (jnp.concatenate(codes) == codes[0][0]).mean() > 0.9


# Commands


def test_attention(benchmark: Any, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plot.png"
    names = ["cudnn", "mosaic_gpu", "xla", "xla_op", "xla_expectation"]
    report, out = benchmark("attention", *HEADS, "--plot", picture, "--implementations", *names)
    assert set(report) == {
        "benchmark",
        "date",
        "device",
        "versions",
        "commit",
        "arguments",
        "rows",
    }
    assert report["benchmark"] == "attention"
    assert report["device"]["platform"] == jax.default_backend()
    assert report["versions"]["jax"] == jax.__version__
    arguments = report["arguments"]
    assert (arguments["n"], arguments["m"], arguments["tokens"]) == ([16], [3], 64)
    assert not {"json", "plot"} & set(arguments)
    rows = by_name(report)
    assert list(rows) == [
        ("cudnn", 16, None),
        ("mosaic_gpu", 16, 3),
        ("xla", 16, 3),
        ("xla_op", 16, 3),
        ("xla_expectation", 16, None),
    ]
    for row in report["rows"]:
        assert (row["batch"], row["heads"]) == (2, 2)
        assert "reason" in row or set(row) >= MEASURED
        if row["implementation"].startswith("xla"):
            assert row["wall_ms"] > 0
            # Three (bfloat16) inputs are the least.
            assert row["argument_bytes"] >= 3 * 64 * 16 * 2
    if jax.default_backend() == "cpu":
        assert "cuDNN" in rows["cudnn", 16, None]["reason"]
        assert "needs an NVIDIA GPU" in rows["mosaic_gpu", 16, 3]["reason"]
        assert "needs an NVIDIA GPU" in out
    assert "xla_expectation" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_backward_with_padding(benchmark: Any) -> None:
    options = ["--backward", "--mask-fraction", 0.25, "--implementations", "xla"]
    report, _ = benchmark("attention", *HEADS, *options)
    (row,) = report["rows"]
    # The result and three gradients.
    assert row["output_bytes"] >= 4 * 64 * 16 * 2
    assert report["arguments"]["backward"] is True


def test_hash(benchmark: Any) -> None:
    report, out = benchmark("hash", *HEADS)
    row = by_name(report)["xla", 16, 3]
    assert row["flops"] == 2 * 64 * 16 * 3 * 3
    assert row["tflop_per_s"] > 0
    assert "TFLOP/s" in out


def test_cumulation(benchmark: Any) -> None:
    report, out = benchmark("cumulation", *HEADS)
    rows = by_name(report)
    for direction in ("forward", "grad_value"):
        assert rows["xla", direction, 16, 3]["wall_ms"] > 0
        assert ("mosaic_gpu", direction, 16, 3) in rows
    assert "grad_value" in out


def test_gradient_of_the_cumulation_swaps_the_codes() -> None:
    options = Cumulation(n=(8,), m=(3,), tokens=8, head_dim=4, dtype="float32", hash_code_len=3)
    query_codes, key_codes, value = options.make_inputs(8, 3, 0)
    gradient = options.cumulate("xla", "grad_value", query_codes, key_codes, value)
    swapped = options.cumulate("xla", "forward", key_codes, query_codes, value)
    np.testing.assert_allclose(gradient, swapped, rtol=1e-6)


def test_model(benchmark: Any) -> None:
    size = ["--layers", 1, "--hidden-size", 16, "--heads", 2, "--vocab-size", 20]
    report, out = benchmark("model", *SMALL, *size)
    rows = by_name(report)
    assert list(rows) == [
        ("softmax", 16, None),
        ("expectation", 16, None),
        ("sampled", 16, 3),
        ("sampled_mixed", 16, 3),
        ("sampled_bucketed", 16, 3),
        ("transformers_roberta", 16, None),
        ("transformers_yoso", 16, None),
    ]
    softmax, *_ = report["rows"]
    for row in report["rows"]:
        assert row["batch"] == 4
        if "reason" not in row:
            assert row["tokens_per_s"] == pytest.approx(64e3 / row["wall_ms"])
            assert row["speed_wall"] == pytest.approx(softmax["wall_ms"] / row["wall_ms"])
    assert [row["implementation"] for row in report["rows"] if "reason" in row] in (
        [],
        list(MODELS),
    )
    assert "tokens/s" in out


def test_some_models(benchmark: Any) -> None:
    size = ["--layers", 1, "--hidden-size", 16, "--heads", 2, "--vocab-size", 20]
    report, _ = benchmark("model", *SMALL, *size, "--implementations", "softmax", "sampled_mixed")
    assert list(by_name(report)) == [("softmax", 16, None), ("sampled_mixed", 16, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing subcommand"),
        (["attention", "--n", "0"], "--n must be >= 1, got 0"),
        (["attention", "--n", "x"], "--n"),
        (["hash", "--m"], "--m must have at least one number"),
        (["hash", "--m", "4", "-1"], "--m must be >= 1, got 4 -1"),
        (["cumulation", "--hash-code-len", "17"], "--hash-code-len must be in 1..16, got 17"),
        (["attention", "--n", "64", "--tokens", "32"], "--tokens must be at least --n, got 32"),
        (["attention", "--mask-fraction", "1"], "--mask-fraction must be in [0, 1), got 1.0"),
        (["attention", "--num-backward-hashes", "0"], "--num-backward-hashes must be >= 1, got 0"),
        (["attention", "--bucket-bits", "10"], "--bucket-bits must be in 1..9 (--hash-code-len)"),
        (["attention", "--seconds", "0"], "--seconds must be > 0, got 0.0"),
        (["attention", "--head-dim", "0"], "--head-dim must be >= 1, got 0"),
        (["attention", "--implementations", "flash"], "flash"),
        (["attention", "--json", "{file}/x.json"], "file"),
        (["model", "--n", "16", "--heads", "5"], "num_attention_heads"),
        (["model", "--n", "16", "--implementation", "flash"], "attention_implementation"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_mistakes_end_with_one_message(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    names = {"file": tmp_path / "file"}
    code, out, err = run("benchmark.py", *(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_plot_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("benchmark.py", "hash", *HEADS, "--plot", "x.png")
    assert (code, out) == (2, "")
    assert err == "error: --plot needs matplotlib: pip install '.[plot]'\n"


def test_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("yoso_jax.benchmarking.report.write_report", fail)
    code, _, err = run("benchmark.py", "hash", *HEADS, "--json", tmp_path / "x.json")
    assert code == DiskFullError.exit_code
    assert "Traceback" not in err


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_timed_beside_cudnn(benchmark: Any) -> None:
    sizes = ["--n", 256, "--m", 8, "--tokens", 4096, "--seconds", 0.01]
    report, _ = benchmark("attention", *sizes, "--implementations", "cudnn", "mosaic_gpu")
    assert report["device"]["driver"]
    for row in report["rows"]:
        assert "reason" not in row
        assert 0 < len(row["kernels"]) <= 8
        assert sum(row["kernels"].values()) <= 1.001 * row["device_ms"]
        assert row["device_ms"] > 0
        assert math.isfinite(row["speed_device"])


# Tables


REPORT = {
    "benchmark": "attention",
    "date": "2026-01-02T03:04:05+00:00",
    "device": {"platform": "gpu", "kind": "NVIDIA H100", "driver": "570.1"},
    "versions": {"jax": "0.11.2", "jaxlib": "0.11.2"},
    "commit": None,
    "arguments": {
        "tokens": 8192,
        "head_dim": 64,
        "hash_code_len": 9,
        "dtype": "bfloat16",
        "backward": False,
        "mask_fraction": 0.25,
    },
    "rows": [
        {
            "implementation": implementation,
            "n": n,
            "m": m,
            "wall_ms": 1.2 * ms,
            "device_ms": ms,
            "speed_wall": 1 / ms,
            "speed_device": 1 / ms,
            "temp_bytes": 2**20,
            "kernels": {"cumulation": 0.6 * ms, "slice_values": 0.1 * ms, "transpose": 0.3 * ms},
        }
        for n in (2048, 1024)
        for implementation, m, ms in (
            ("cudnn", None, 1.0),
            ("mosaic_gpu", 32, 0.25),
            ("mosaic_gpu_op", 32, 0.5),
            ("xla", 32, 8.0),
        )
        if (implementation, n) != ("cudnn", 1024)
    ]
    + [{"implementation": "cudnn", "n": 1024, "m": None, "reason": "none"}],
}
TABLE = """\
| n | m | cuDNN | hash and cumulation | attention | on the wall | `yoso_attention` | MiB |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 1,024 | 32 | - | 0.150 | 0.250 | 0.300 | 0.500 | 1.0 |
| 2,048 | 32 | 1.000 | 0.150 (6.67 x) | 0.250 (4.00 x) | 0.300 (4.00 x) | 0.500 (2.00 x) | 1.0 |
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A page with an empty place for the table of `speed.json`, which is beside it."""
    (tmp_path / "speed.json").write_text(json.dumps(REPORT))
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- benchmark: speed -->\n<!-- end -->\nafter\n")
    return path


def test_readme_table_is_written_once_and_checked(run: Run, page: Path) -> None:
    paths = ["--pages", page, "--results", page.parent]
    code, out, err = run("update_readme.py", "--check", *paths)
    assert (code, out) == (3, "")
    assert "run scripts/update_readme.py" in err
    assert run("update_readme.py", *paths)[0] == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark: speed -->\n\n" + TABLE + "\n")
    assert text.endswith("\n\n<!-- end -->\nafter\n")
    (note,) = (line for line in text.splitlines() if "Measured on" in line)
    for part in ("NVIDIA H100, driver 570.1, jax 0.11.2", "2026-01-02", "8,192", "25% of them"):
        assert part in note
    assert run("update_readme.py", "--check", *paths)[0] == 0
    assert run("update_readme.py", *paths)[0] == 0
    assert page.read_text() == text


def test_readme_table_of_another_benchmark(run: Run, page: Path) -> None:
    row = {"implementation": "xla", "direction": "forward", "n": 1024, "m": 32}
    row |= {"wall_ms": 3.0, "device_ms": 2.0, "floor_fraction": 0.5, "temp_bytes": 0}
    report = REPORT | {"benchmark": "cumulation", "rows": [row, row | {"direction": "grad_value"}]}
    (page.parent / "speed.json").write_text(json.dumps(report))
    assert run("update_readme.py", "--pages", page, "--results", page.parent)[0] == 0
    text = page.read_text()
    assert "| implementation | direction | n | m | ms device | ms wall | of floor | MiB |" in text
    assert "| xla | grad_value | 1024 | 32 | 2.0000 | 3.0000 | 50% | 0.0 |" in text


TRAINED = {
    "task": "text",
    "n": 4096,
    "attention": "softmax",
    "seed": 0,
    "steps": 1200,
    "learning_rate": 0.001,
    "initializer_range": 0.02,
    "data": {"corpora": ["a", "b"]},
    "test_loss": 0.1,
    "test_accuracy": 0.3485,
    "device": "NVIDIA H200",
    "date": "2026-01-02T03:04:05+00:00",
}
SAMPLED = {"attention": "yoso_32", "num_hash": 32}
BUCKETED = {"attention_backward": "bucketed", "num_backward_hashes": 2, "bucket_bits": 3}
TRAINED_TABLE = """\
| task | n | steps | softmax | YOSO-E | YOSO-32, sampled | YOSO-32, bucketed, 2 x 512 | \
YOSO-32, bucketed, 8 x 512 (1) |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| mlm, perplexity, hash code len 9 | 4,096 | 1,200 | 1,050.3 | - | 7.0 | - | - |
| mlm, perplexity, hash code len 16 | 4,096 | 1,200 | 1,050.3 | 6.0 | - | - | - |
| text, learning rate 0.001, initializer range 0.02 | 4,096 | 1,200 | 34.9, 50.0, 60.0 | -, 70.0 \
| - | 80.0, -, 90.0 | 10.0 |
| text, learning rate 0.001, initializer range 0.06 | 4,096 | 1,200 | 20.0 | - | - | - | - |
| text, learning rate 0.01, initializer range 0.02 | 4,096 | 9,000 | - | - | 30.0 | - | - |
"""


def test_table_of_trained_models(run: Run, page: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"test_accuracy": 0.3485},
        {"seed": 2, "test_accuracy": 0.6},
        {"seed": 1, "test_accuracy": 0.5},
        {"seed": 1, "test_accuracy": 0.4, "date": "2026-01-01T03:04:05+00:00"},
        {"initializer_range": 0.06, "test_accuracy": 0.2},
        {"seed": 1, "attention": "yoso_e", "test_accuracy": 0.7},
        SAMPLED | BUCKETED | {"test_accuracy": 0.8},
        SAMPLED | BUCKETED | {"seed": 2, "test_accuracy": 0.9},
        SAMPLED | BUCKETED | {"num_backward_hashes": 8, "test_accuracy": 0.1, "note": "noisy"},
        SAMPLED | BUCKETED | {"test_accuracy": 0.99, "in_table": False, "device": "NVIDIA H100"},
        SAMPLED
        | {"attention_backward": "sampled", "steps": 9000, "learning_rate": 0.01}
        | {"test_accuracy": 0.3},
        {"task": "mlm", "test_perplexity": 1050.25},
        {"task": "mlm", "test_perplexity": 6, "attention": "yoso_e", "hash_code_len": 16},
        SAMPLED
        | {"task": "mlm", "test_perplexity": 7, "hash_code_len": 9}
        | {"attention_backward": "sampled"},
    ]
    report = REPORT | {"benchmark": "training", "rows": [TRAINED | change for change in changes]}
    (page.parent / "speed.json").write_text(json.dumps(report | {"arguments": {}}))
    assert run("update_readme.py", "--pages", page, "--results", page.parent)[0] == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark: speed -->\n\n" + TRAINED_TABLE + "\n")
    assert "in %; (1) noisy. Trained on NVIDIA H200, 2026-01-01 to 2026-01-02, collected" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(REPORT | {"benchmark": "training", "rows": []}), "no row that was tested"),
        (None, "cannot read the report"),
        ("{", "cannot read the report"),
        ("[]", "is no report"),
        ('{"rows": []}', "is no report"),
        (json.dumps(REPORT | {"rows": []}), "has no row that was measured"),
    ],
)
def test_damaged_report_leaves_the_page(
    run: Run, page: Path, text: str | None, message: str
) -> None:
    report, before = page.parent / "speed.json", page.read_text()
    report.unlink()
    if text is not None:
        report.write_text(text)
    code, out, err = run("update_readme.py", "--pages", page, "--results", page.parent)
    assert (code, out) == (3, "")
    assert message in err
    assert page.read_text() == before


def test_readme_plot_is_of_the_report(
    run: Run, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.write_text("![Speed](benchmarks/plots/speed.svg)\n")
    plot = page.parent / "benchmarks" / "plots" / "speed.svg"
    paths = ["--pages", page, "--results", page.parent]
    code, _, err = run("update_readme.py", "--check", *paths)
    assert code == 3
    assert "speed.svg is not drawn from speed.json" in err
    assert run("update_readme.py", *paths)[0] == 0
    first = plot.read_bytes()
    assert run("update_readme.py", *paths)[0] == 0
    assert plot.read_bytes() == first
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("update_readme.py", "--check", *paths)[0] == 0
    code, _, err = run("update_readme.py", *paths)
    assert (code, err) == (2, "error: plots need matplotlib: pip install '.[plot]'\n")
    (page.parent / "speed.json").write_text(json.dumps(REPORT | {"date": "2026-01-03"}))
    assert run("update_readme.py", "--check", *paths)[0] == 3


def test_our_pages_are_what_the_reports_say(run: Run) -> None:
    code, out, err = run("update_readme.py", "--check")
    assert code == 0, err
    assert "training.md is up to date" in out
