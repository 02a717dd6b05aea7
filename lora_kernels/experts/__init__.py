"""LoRA linears of many experts, each on its own rows of one input."""
