"""Step 4: fine-tune. Losses, optimizer, step, checkpoints and the loop."""
