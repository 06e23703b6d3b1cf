"""Predicts a run's memory, speed and cost on any devices, from the model's shapes and published hardware rates."""
