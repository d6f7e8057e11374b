"""How KV bytes get from a source's pool into a target's. The target reads, always: see base.py."""
