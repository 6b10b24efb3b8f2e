"""Sizes that are learned."""
