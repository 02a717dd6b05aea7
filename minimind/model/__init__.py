"""The language model of every era, its weights on disk, and what it answers."""
