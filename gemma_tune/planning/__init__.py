"""What a run would take on devices that aren't there: memory, time and cost, from shapes and published rates."""
