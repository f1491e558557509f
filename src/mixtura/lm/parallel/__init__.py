"""Training on many devices: where experts live, how tokens reach them, and what it costs."""
