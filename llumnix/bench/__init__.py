"""Benchmarks: each `llumnix bench NAME --json FILE`."""
