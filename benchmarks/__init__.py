"""Side-by-side measurements, each a command; results are in RESULTS.md."""
