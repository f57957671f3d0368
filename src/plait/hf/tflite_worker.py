"""Run by the environment of `tflite.py`, which has litert-torch and nothing of ours: `python tflite_worker.py FOLDER`.

Reads `program.pt2`, `graph.json` (names of inputs and outputs, in their order) and `cases.npz` (each input for a few
cases, (cases, ...)); writes `model.tflite`, `results.npz` of LiteRT's interpreter (each output, (cases, ...)), and
`outcome.json`: {}, or what was `missing` here or `refused`.
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
    names = json.loads((folder / "graph.json").read_text())
    inputs, outputs = names["inputs"], names["outputs"]

    class Named(torch.nn.Module):
        """Gives the graph's inputs and outputs their names."""

        def __init__(self, program: torch.nn.Module) -> None:
            super().__init__()
            self.program = program

        def forward(self, **named: torch.Tensor) -> dict[str, torch.Tensor]:
            result = self.program(*(named[name] for name in inputs))
            return dict(zip(outputs, result if isinstance(result, tuple) else (result,), strict=True))

    with np.load(folder / "cases.npz") as stored:
        cases = {name: stored[name] for name in inputs}
    try:
        module = Named(torch.export.load(folder / "program.pt2").module())
        example = {name: torch.from_numpy(values[0]) for name, values in cases.items()}
        litert_torch.convert(module, sample_kwargs=example).export(str(folder / "model.tflite"))
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:600]}
    run = Interpreter(model_path=str(folder / "model.tflite")).get_signature_runner()
    dtypes = {name: detail["dtype"] for name, detail in run.get_input_details().items()}
    results = []
    for case in range(len(cases[inputs[0]])):
        results.append(run(**{name: values[case].astype(dtypes[name]) for name, values in cases.items()}))
    np.savez(folder / "results.npz", **{name: np.stack([result[name] for result in results]) for name in outputs})  # type: ignore[arg-type]
    types = {name: np.dtype(dtype).name for name, dtype in dtypes.items()}
    (folder / "inputs.json").write_text(json.dumps(types))
    return {}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "outcome.json").write_text(json.dumps(main(place)))
