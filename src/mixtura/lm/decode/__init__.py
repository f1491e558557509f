"""Ways to choose the next token that only a mixture of experts has."""
