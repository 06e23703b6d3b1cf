"""Parts that only training and serving on a CPU need."""
