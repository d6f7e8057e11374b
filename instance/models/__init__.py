"""Models in Hugging Face form: their configuration, their weights, and one decoder for all of them."""
