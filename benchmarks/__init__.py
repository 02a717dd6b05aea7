"""What LoRA costs, and who is fastest: suites, contenders, timing, report, tuner."""
