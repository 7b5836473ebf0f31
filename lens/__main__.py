"""``python -m lens``: the same as the ``lens`` command."""

import sys

from lens.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
