"""Structured pruning: whole feed-forward neurons and attention heads go, and what is left is a smaller ordinary model."""
