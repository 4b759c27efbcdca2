"""`python -m kdzoo` is `kdzoo`: what launchers call."""

import sys

from kdzoo.cli import main

sys.exit(main())
