"""Starts vLLM inside this process, with the settings that Llumnix needs and the user's own arguments beside
them. vLLM allows one engine per process. Under tensor parallelism its scheduler is in this process and each
rank in one of its own, on this host. Called by the engine adapter (vllm_core.py).
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

import torch

from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.kv_pool import GIB
from llumnix.instance.model_loader import resolve_model
from llumnix.instance.vllm_adapters import read_adapters
from llumnix.instance.vllm_arguments import check_version, parse_arguments, speculates
from llumnix.instance.vllm_exchange import BLOCK_SIZE, EXCHANGE
from llumnix.instance.vllm_shared_names import meeting_file, take_away

ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler must be in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # our logits processor speaks the first one's language
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several instances share a machine's cores
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
}
PLAIN_ENVIRONMENT: Final = {
    name: value for name, value in ENVIRONMENT.items() if name != "VLLM_USE_V2_MODEL_RUNNER"
}
DEFAULTS: Final = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
ERROR_CHARS_MAX: Final = 500
PREFIX_CACHING: Final = "enable_prefix_caching"
NULL_BLOCKS: Final = 1
"""Blocks of its pool that vLLM never gives out."""


OURS_ALONE: Final = (
    *("async_scheduling", "kv_transfer_config", "logits_processors", "scheduling_policy", "worker_cls"),
)
"""What vLLM is asked for Llumnix's sake."""


def start_plain_vllm(config: EngineConfig) -> Any:
    """vLLM with the same settings but without all that Llumnix adds, for benchmarks to compare with."""
    return _start(config, "", plain=True)


def start_vllm(config: EngineConfig, exchange_name: str) -> Any:
    """A vLLM engine of its own for this process. Raises ConfigurationError, in one line, with the reason why
    there is none."""
    return _start(config, exchange_name, plain=False)


def _start(config: EngineConfig, exchange_name: str, *, plain: bool) -> Any:
    check_version()
    given = parse_arguments(config.engine_args)
    model = str(resolve_model(config.model))
    _prepare_process(config, ENVIRONMENT if not plain else PLAIN_ENVIRONMENT)
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from llumnix.instance.vllm_lora import lora_arguments  # imports vLLM, which reads the environment

    adapters = read_adapters(config)
    known = {field.name for field in fields(EngineArgs)}
    for name in given:
        if name not in known:
            raise ConfigurationError(f"engine_args: vLLM has no argument {name}")
    if unshared(config) and not plain:
        given[PREFIX_CACHING] = True
    arguments = {**_arguments(config, model, exchange_name, given), **given}
    if plain:
        arguments = {name: value for name, value in arguments.items() if name not in OURS_ALONE}
    arguments |= lora_arguments(adapters, given)
    started = in_one_line(lambda: LLMEngine.from_engine_args(EngineArgs(**arguments)))
    if config.tensor_parallel == 1:  # it has met nobody, and nobody else comes; ranks do it when they end
        take_away(filter(None, map(meeting_file, started.collective_rpc(_init_method))))
    return started


def _init_method(worker: Any) -> str:
    return str(worker.distributed_init_method)


def unshared(config: EngineConfig) -> bool:
    """Whether no request is to find what another has computed. vLLM's prefix cache is on nevertheless, since
    it is how a request that arrives finds its own: the requests must then be told apart by a salt."""
    return parse_arguments(config.engine_args).get(PREFIX_CACHING) is False


def _arguments(
    config: EngineConfig, model: str, exchange_name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(
        kv_connector="LlumnixConnector",
        kv_connector_module_path="llumnix.instance.vllm_connector",
        kv_role="kv_both",
        kv_connector_extra_config={
            EXCHANGE: exchange_name,
            BLOCK_SIZE: config.block_size,
        },
    )
    arguments = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len or None,
        "max_num_seqs": config.batch_max,
        "max_num_batched_tokens": config.step_tokens_max,
        "gpu_memory_utilization": config.gpu_memory_share,
        "scheduling_policy": "priority",
        "async_scheduling": False,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "tensor_parallel_size": config.tensor_parallel,
        "kv_transfer_config": connector,
        "disable_log_stats": True,
    }
    if config.tensor_parallel > 1:
        arguments["worker_cls"] = "llumnix.instance.vllm_rank_worker.RankWorker"
    if not speculates(given):
        arguments["logits_processors"] = ["llumnix.instance.vllm_sampling:LlumnixLogitsProcessor"]
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        arguments["kv_cache_memory_bytes"] = int(config.kv_gib * GIB) // config.tensor_parallel
    if config.kv_blocks:
        size = given.get("block_size", 16 if on_gpu else 128)
        if type(size) is not int or size < 1:
            raise ConfigurationError(f"engine_args: block_size must be a positive number, got {size!r}")
        arguments["block_size"] = size
        arguments["num_gpu_blocks_override"] = -(-config.kv_blocks * config.block_size // size) + NULL_BLOCKS
    return arguments


def _prepare_process(config: EngineConfig, environment: Mapping[str, str]) -> None:
    """What vLLM reads from the environment. It concerns this process alone, which runs nothing else."""
    os.environ.update(environment)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if config.threads:
        threads = max(1, config.threads // config.tensor_parallel)  # of each rank
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["NUMBA_NUM_THREADS"] = str(threads)  # guessing tokens by n-grams sets torch's too
        torch.set_num_threads(threads)
    logging.getLogger("vllm").setLevel(logging.WARNING)


def in_one_line(make: Callable[[], Any], failing: str = "vLLM did not start") -> Any:
    """What vLLM makes. It refuses settings, models and memory with several kinds of error; here they are
    ConfigurationError."""
    try:
        return make()
    except Exception as error:  # of many kinds, and a bare one when a rank does not come up
        text = " ".join(str(error).split())[:ERROR_CHARS_MAX] or type(error).__name__
        raise ConfigurationError(f"{failing}: {text}") from error
