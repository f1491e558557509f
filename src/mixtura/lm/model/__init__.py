"""The decoder made of parts."""
