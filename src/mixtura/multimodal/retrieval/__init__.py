"""Search by meaning, learned from text that nobody labelled."""
