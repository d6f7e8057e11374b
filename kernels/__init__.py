"""Kernels that write, read and move KV blocks and compute on them: Triton for GPUs, C for CPUs, and a plain
torch reference for each, which defines what is right."""
