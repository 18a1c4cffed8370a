"""Layers that torch does not ship; each is imported from its own module."""
