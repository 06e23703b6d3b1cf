"""Writes ordinal numbers in messages."""


def ordinal(number: int) -> str:
    """Returns 1st, 2nd, 3rd, 4th, …, 11th, 12th, …, 21st, ….

    Args:
        number: Natural number.
    """
    last_two = number % 100
    suffix = "th" if 10 < last_two < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
