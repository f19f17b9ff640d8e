"""``python -m lqkd``, and the short command ``lqkd``."""

import sys

from lqkd.cli import main as run


def main() -> int:
    """Run the command line; classes of one's own are found in the current folder, as ``python -m`` finds them."""
    if not getattr(sys.flags, "safe_path", False) and "" not in sys.path:
        sys.path.insert(0, "")
    return run()


if __name__ == "__main__":
    sys.exit(main())
