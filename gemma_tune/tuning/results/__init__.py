"""Shows what a search finds: on the terminal, in files, and as settings to train with."""
