"""``python -m lqkd``."""

import sys

from lqkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
