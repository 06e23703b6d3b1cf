"""Says which settings a search may change, and with which values."""
