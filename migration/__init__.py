"""Live migration: the protocol as two pure state machines, and the transports that move KV bytes."""
