"""A small Llama with random weights as a folder: with heads enough for tensor parallelism, which SmolLM2 has
not, and logits far enough apart for greedy decoding to be the same on one rank and on several."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 8, 4


def small_llama(folder: Path, vocabulary: int = 2048) -> str:
    """Write it; returns the folder's name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
