"""Adapters as a whole: in a model, and on disk."""
