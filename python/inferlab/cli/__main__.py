"""`python -m inferlab.cli` is the `inferlab` command."""

import sys

from inferlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
