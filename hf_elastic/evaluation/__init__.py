"""Sizes and phase plans measured on tasks, and how charts look."""
