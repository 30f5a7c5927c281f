"""The student: loading, LoRA, and the head with its fused divergence."""
