"""The wire's whole vocabulary. ``serving``: frontend and instance. ``control``: manager and everyone.
``migration``: source and target instance. ``ranks``: a vLLM instance and the processes of its ranks. Each
class is a frozen, slotted dataclass; the codec gives each a stable tag. Addresses are ZeroMQ endpoints
(``tcp://host:port``) at which a process takes messages; a message that wants an answer carries the address
to answer to.
"""
