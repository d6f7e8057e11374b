"""What a frontend must know of a model that vLLM runs: vLLM knows many more architectures than our engine, so
only what all of them share is read from the model's folder. Imports no vLLM."""

from dataclasses import dataclass
from pathlib import Path

from llumnix.core.errors import ConfigurationError
from llumnix.instance.model_loader import read_json, token_ids
from llumnix.instance.vllm_heads import check_heads


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``max_model_len`` as the model's configuration says, 0 if it does not."""

    eos_token_ids: frozenset[int]
    vocab_size: int
    max_model_len: int


def read_facts(folder: Path, tensor_parallel: int = 1) -> ModelFacts:
    """Of a model's folder. Raises ConfigurationError naming what is missing, or if it does not run on so many
    ranks (as far as the configuration says; vLLM knows for certain)."""
    raw = read_json(folder / "config.json")
    text = raw.get("text_config", raw)
    if not isinstance(text, dict) or type(text.get("vocab_size")) is not int:
        raise ConfigurationError(f"{folder / 'config.json'} has no vocab_size")
    heads, kv_heads = (text.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if type(heads) is int and tensor_parallel > 1:
        check_heads(tensor_parallel, heads, kv_heads if type(kv_heads) is int else heads)
    longest = text.get("max_position_embeddings", 0)
    return ModelFacts(end_tokens(folder), text["vocab_size"], longest if type(longest) is int else 0)


def end_tokens(folder: str | Path) -> frozenset[int]:
    """The tokens that end a text (may be none)."""
    raw = read_json(Path(folder) / "config.json")
    path = Path(folder) / "generation_config.json"
    ended_by = read_json(path).get("eos_token_id") if path.is_file() else None
    return token_ids(raw.get("eos_token_id") if ended_by is None else ended_by)
