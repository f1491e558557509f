"""Separation: what a query asks for, out of a recording."""
