"""Weights in few bits: codes, recipes, and what becomes of them in a family of sizes."""
