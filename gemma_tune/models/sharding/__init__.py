"""Where each array of a model lies on a mesh of devices, and what its layers do there."""
