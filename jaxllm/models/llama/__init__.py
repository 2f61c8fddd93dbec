"""Llama: one layer, the model around it, and its decoding."""
