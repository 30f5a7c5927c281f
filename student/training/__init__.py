"""Training runs: options, trainer, checkpoints, costs."""
