"""One instance: requests, KV memory, local scheduling, the engines, and the agent that speaks for them."""
