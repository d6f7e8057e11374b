"""Puts one instance together from its configuration: executor, engine, KV transports, agent, server."""

import asyncio
import os
from collections.abc import Callable
