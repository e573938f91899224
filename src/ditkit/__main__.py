"""`python -m ditkit`, and `torchrun -m ditkit`."""

import sys

from ditkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
