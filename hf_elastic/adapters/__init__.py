"""Saved LoRA adapters, cut to a size."""
