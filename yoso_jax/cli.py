"""What the scripts share: one message on standard error, and exit codes."""

import logging
import sys
import warnings
from collections.abc import Callable

from yoso_jax.errors import RunError

EXIT_CODES = """exit codes: 0 done, or stopped by SIGTERM and saved; 2 configuration or option;
3 data; 4 checkpoint; 5 loss not finite or too large; 6 disk full; 130 Ctrl-C"""


def run(main: Callable[[], None]) -> None:
    """Calls `main`; ends the process with a message and its exit code if it raises a `RunError`."""
    # A full disk or a damaged file stops several of Orbax's threads and coroutines, each of which
    # would add a traceback to the one message below.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = lambda unraisable: None
    try:
        main()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
