"""The kernels for GPUs: Triton programs and their Python side."""
