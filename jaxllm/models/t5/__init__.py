"""T5: its layers, encoder and decoder around them, and its decoding."""
