"""Metrics of answers: of texts, numbers, JSON, tool calls, choices, and functions of the user's own."""
