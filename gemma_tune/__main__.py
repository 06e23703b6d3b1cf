"""`python -m gemma_tune VERB`, which the console script `gemma-tune` is too."""

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from gemma_tune.cli.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
