"""What a frontend must know of the model: its name, its tokenizer's folder, its limits. Reads no weights."""

from llumnix.api.backend import ModelInfo
from llumnix.core.config import EngineConfig
from llumnix.core.errors import ConfigurationError
from llumnix.instance.model_loader import read_model_folder, resolve_model
from llumnix.instance.simulated_executor import EOS_TOKEN, MAX_MODEL_LEN_DEFAULT, VOCAB_SIZE
from llumnix.instance.vllm_adapters import read_adapters
from llumnix.instance.vllm_arguments import check_version, parse_arguments, speculates
from llumnix.instance.vllm_model import read_facts

SIMULATED_NAME = "simulated"


def served_name(config: EngineConfig, served_model_name: str) -> str:
    """The name under which the API offers the model."""
    return served_model_name or (SIMULATED_NAME if config.kind == "simulated" else config.model)


def model_info(config: EngineConfig, served_model_name: str = "", longest: int = 0) -> ModelInfo:
    """The model of a configuration, fetched or converted first if need be. ``longest`` is the longest prompt
    + output the instances take (their KV may hold less than the model could); 0 if none is known yet. Raises
    ConfigurationError in one line."""
    name = served_name(config, served_model_name)
    if config.kind == "simulated":
        limit = longest or config.max_model_len or MAX_MODEL_LEN_DEFAULT
        return ModelInfo(name, limit, "", (EOS_TOKEN,), VOCAB_SIZE)
    if config.kind == "vllm":
        check_version()
        greedy_only = speculates(parse_arguments(config.engine_args))
        adapters = tuple(adapter.name for adapter in read_adapters(config))
        if name in adapters:
            raise ConfigurationError(f"lora_modules: {name!r} is the model's own name")
        path = resolve_model(config.model)
        facts = read_facts(path, config.tensor_parallel)
        limit = longest or config.max_model_len or facts.max_model_len
        return ModelInfo(
            name,
            limit,
            str(path),
            tuple(sorted(facts.eos_token_ids)),
            facts.vocab_size,
            adapters,
            greedy_only,
        )
    folder = read_model_folder(resolve_model(config.model))
    limit = longest or folder.config.usable_len(config.max_model_len)
    return ModelInfo(
        name, limit, str(folder.path), tuple(sorted(folder.eos_token_ids)), folder.config.vocab_size
    )
