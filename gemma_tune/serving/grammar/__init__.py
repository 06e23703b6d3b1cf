"""Grammars that answers follow: which tokens may come next, by llguidance."""
