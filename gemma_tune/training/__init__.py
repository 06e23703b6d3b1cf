"""Fine-tunes a model: losses, optimizer, training step, checkpoints and loop (step 4 of the pipeline)."""
