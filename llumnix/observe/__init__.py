"""Metrics and events, as subscribers to what the cores report."""
