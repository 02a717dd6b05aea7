"""LoRA linears that read the same input, computed together."""
