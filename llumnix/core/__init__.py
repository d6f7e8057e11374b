"""Ids, errors, configuration, messages and views: what every other part shares. Imports nothing of ours."""
