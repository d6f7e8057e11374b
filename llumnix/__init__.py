"""Llumnix serves one LLM on many instances and live-migrates running requests between them."""

__version__ = "0.1.0"
