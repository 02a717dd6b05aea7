"""Adapters as a whole: in a model, and on disk."""

from .files import write_atomically
from .sharding import cut_like, is_sharded, whole
from .surgery import insert_lora
from .targets import strip_wrappers
from .tensor_files import pass_on_what_is_no_damage, refuse_overlapping, strange_tensor
from .wording import shortened

__all__ = [
    "cut_like",
    "insert_lora",
    "is_sharded",
    "pass_on_what_is_no_damage",
    "refuse_overlapping",
    "shortened",
    "strange_tensor",
    "strip_wrappers",
    "whole",
    "write_atomically",
]
