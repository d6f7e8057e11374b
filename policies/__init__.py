"""Scheduling policies: pure functions of the views in llumnix.core.views. The plug-in surface."""
