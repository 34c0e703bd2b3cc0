"""`python -m qsnap.cli` is `qsnap`."""

import sys

from qsnap.cli import main

sys.exit(main())
