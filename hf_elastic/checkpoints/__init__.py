"""Checkpoints in both layouts: opened, loaded, written, exported."""
