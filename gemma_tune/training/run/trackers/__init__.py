"""Passes the metrics of a run on to trackers: TensorBoard, MLflow, Weights & Biases and Trackio."""
