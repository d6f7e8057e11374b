"""The OpenAI-compatible HTTP frontend, its admin endpoints, and the token streams behind both."""
