"""Step 7: take a model to where people are. Formats that other programs read."""
