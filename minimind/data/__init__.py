"""Conversations, the tokenizer that reads them, and the project's own text."""

from .sft import SFTDataset, find_data, read_conversations

__all__ = ["SFTDataset", "find_data", "read_conversations"]
