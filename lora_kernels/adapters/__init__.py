"""Adapters as a whole: in a model, and on disk."""

from .feed_forwards import fuse_feed_forwards
from .files import write_atomically
from .sharding import cut_like, is_sharded, whole
from .surgery import insert_lora
from .targets import strip_wrappers

__all__ = [
    "cut_like",
    "fuse_feed_forwards",
    "insert_lora",
    "is_sharded",
    "strip_wrappers",
    "whole",
    "write_atomically",
]
