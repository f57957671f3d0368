"""Run by the environment of `tflite.py`, which has litert-torch and nothing of ours: `python tflite_worker.py FOLDER`.

Reads `program.pt2` and `ids.npy`, writes `model.tflite`, `logits.npy` of LiteRT's interpreter, and `outcome.json`: {},
or what was `missing` here or `refused`.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> dict[str, str]:
    """What goes into `outcome.json`."""
    try:
        import litert_torch
        import numpy as np
        import torch
        from ai_edge_litert.interpreter import Interpreter
    except Exception as error:  # a half-installed package fails in many ways
        return {"missing": f"{type(error).__name__}: {error}"}

    class Named(torch.nn.Module):
        """Gives the graph's input and output their names."""

        def __init__(self, program: torch.nn.Module) -> None:
            super().__init__()
            self.program = program

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.program(input_ids)}

    ids = np.load(folder / "ids.npy")
    try:
        module = Named(torch.export.load(folder / "program.pt2").module())
        example = {"input_ids": torch.from_numpy(ids[:1]).long()}
        litert_torch.convert(module, sample_kwargs=example).export(str(folder / "model.tflite"))
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:600]}
    run = Interpreter(model_path=str(folder / "model.tflite")).get_signature_runner()
    np.save(folder / "logits.npy", np.concatenate([run(input_ids=row[None])["logits"] for row in ids]))
    return {}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "outcome.json").write_text(json.dumps(main(place)))
