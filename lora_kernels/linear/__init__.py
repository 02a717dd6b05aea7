"""One linear layer with LoRA."""
