"""A small Llama with random weights as a folder: with heads enough for tensor parallelism, which SmolLM2 has
not, and logits far enough apart for greedy decoding to be the same on one rank and on several. It says few
different tokens, so that guessing by n-grams is right now and then."""

from pathlib import Path

import torch
from lora_adapters import Adapted
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 32
HIDDEN, INNER, LAYERS = 256, 512, 4
SAID = 16
ADAPTED = Adapted(
    LAYERS,
    {
        "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
        "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
        "mlp.down_proj": (INNER, HIDDEN),
    },
)
"""For adapters: ranks share out what goes out of the former two, and what comes into the latter two."""


def small_llama(folder: Path, vocabulary: int = 2048) -> str:
    """Write it; returns the folder's name."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        unsaid = torch.arange(vocabulary) % (vocabulary // SAID) > 0
        model.lm_head.weight[unsaid] *= 0.01
    model.save_pretrained(folder)
    return str(folder)
