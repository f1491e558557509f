"""mixtura: everything that is mixed, and everything that is being taken apart."""

__version__ = "0.1.0"
