"""`python -m metakern`: the command line, where its script is not on the path."""

import sys

from metakern.cli import main

sys.exit(main())
