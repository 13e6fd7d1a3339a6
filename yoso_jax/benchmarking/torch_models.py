"""Times a model of transformers, in PyTorch: a process of its own, for the `model` benchmark.

`python -m yoso_jax.benchmarking.torch_models OPTIONS`, with a JSON object of the fields of
`Options`, prints the fields of a row as JSON. Nothing of this package depends on PyTorch.
"""

import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import time
from typing import Any

MODELS = {"transformers_roberta": "RobertaForMaskedLM", "transformers_yoso": "YosoForMaskedLM"}
"""Classes of transformers by the name of the implementation; YOSO's is in expectation."""

_CALLS = 5  # in a batch without a wait between them, as JAX's models are timed
_FEWEST_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time: loss and gradients of a masked language model, bfloat16, without dropout."""

    name: str
    """Of `MODELS`."""
    batch: int
    n: int
    layers: int
    hidden_size: int
    heads: int
    vocab_size: int
    hash_code_len: int
    seconds: float


def run(options: Options) -> dict[str, Any]:
    """Times a model in a process of its own, so that its memory is not in the way of JAX's.

    Raises:
      NotImplementedError: PyTorch or transformers is not installed, or the model does not run.
    """
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(options))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if any(reason.endswith(f"No module named {name!r}") for name in ("torch", "transformers")):
        reason = "PyTorch and transformers are not installed"
    raise NotImplementedError(reason)


def main() -> None:
    """Times what the command line asks for."""
    # Not import: neither is a dependency, so type checkers need not find them.
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    options = Options(**json.loads(sys.argv[1]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls: Any = getattr(transformers, MODELS[options.name])
    fields: dict[str, Any] = {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": 4 * options.hidden_size,
        "max_position_embeddings": options.n + 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if options.name == "transformers_yoso":
        fields |= {"use_expectation": True, "hash_code_len": options.hash_code_len}
    else:
        fields |= {"attn_implementation": "sdpa"}
    model = cls(cls.config_class(**fields)).to(device, torch.bfloat16).train()
    ids = torch.randint(3, options.vocab_size, (options.batch, options.n), device=device)

    def run(calls: int) -> float:
        _wait(torch, device)
        start = time.perf_counter()
        for _ in range(calls):
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids).loss.backward()
        _wait(torch, device)
        return (time.perf_counter() - start) / calls

    run(2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    calls = _CALLS if device == "cuda" else 1
    batches = max(_FEWEST_BATCHES, round(options.seconds / (calls * run(1))))
    wall = statistics.median(run(calls) for _ in range(batches))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    row = {
        "wall_ms": 1e3 * wall,
        "device_ms": None,
        "kernels": None,
        "temp_bytes": None,
        "peak_bytes": peak,
        "timed_calls": calls * batches,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(row))


def _wait(torch: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
