"""A model cut to its first layers, for ``llumnix bench live``: the same engine, tokenizer and vocabulary, a
fraction of a step's time, so that enough requests for a P99 pass within minutes. What it says is nonsense.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from llumnix.core.errors import ConfigurationError
from llumnix.instance.model_loader import resolve_model

LAYER_PREFIX = "model.layers."
WEIGHTS = "model.safetensors"


@contextmanager
def cut_model(name: str, layers: int) -> Iterator[str]:
    """A folder with the first ``layers`` layers of a model in one safetensors file, gone at the end. Raises
    ConfigurationError if it has fewer or lies in several files."""
    whole = resolve_model(name)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    if layers > config["num_hidden_layers"] or not (whole / WEIGHTS).is_file():
        raise ConfigurationError(f"--layers {layers}: {name} has {config['num_hidden_layers']} in its files")
    with tempfile.TemporaryDirectory(prefix="llumnix-cut-") as folder:
        for file in whole.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt"):
                shutil.copy(file, folder)
        cut = config | {"num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(cut), encoding="utf-8")
        with safe_open(whole / WEIGHTS, framework="pt") as file:
            names = [tensor for tensor in file.keys() if _layer(tensor) < layers]  # noqa: SIM118
            tensors = {tensor: file.get_tensor(tensor) for tensor in names}
        save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        yield folder


def _layer(tensor: str) -> int:
    """Which layer a tensor is of; -1 for those of none."""
    if not tensor.startswith(LAYER_PREFIX):
        return -1
    return int(tensor.removeprefix(LAYER_PREFIX).partition(".")[0])
