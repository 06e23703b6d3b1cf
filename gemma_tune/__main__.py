"""`python -m gemma_tune VERB`, which the console script `gemma-tune` is too."""

import os
import sys

_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell says it.


def main() -> None:
    """Runs the command line and exits with its code."""
    from gemma_tune.cli.main import run

    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # Whoever read it has enough: `gemma-tune --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _CLOSED_PIPE
    sys.exit(code)


if __name__ == "__main__":
    main()
