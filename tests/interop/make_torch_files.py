"""Makes the files of tests/data/torch that tests/test_torch_files.py reads, but lra_sc_mean.model.

Not part of the test suite: it needs torch (2.3 or later), which this project does not. Run:

    python tests/interop/make_torch_files.py tests/data/torch
"""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64"


def contents() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(6).reshape(2, 3))
        linear.bias.copy_(torch.arange(2))
    return {
        "dtypes": {
            name: torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, name))
            for name in DTYPES.split()
        },
        "base": base,
        "transposed": base.T,
        "strided": base[1:, ::2],
        "expanded": base[0, :3].expand(5, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 7, dtype=torch.int32),
        "parameter": torch.nn.Parameter(torch.tensor([1.0, -1.0])),
        "size": torch.Size([4, 6]),
        "model_state_dict": linear.state_dict(),  # an OrderedDict with an attribute
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "plain": [None, True, -1, 2**40, 0.5, "naïve", (1, (2,)), {0: "integer key"}],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(contents(), folder / "zip.pt")
    torch.save(contents(), folder / "zip_protocol4.pt", pickle_protocol=4)
    torch.save(contents(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"z": torch.tensor([1j])}, folder / "complex.pt")


if __name__ == "__main__":
    main()
