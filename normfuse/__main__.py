"""``python -m normfuse``: the command line, where the console script is not on the path.

Python puts the current folder in front of everything that is installed; a file there called ``timm.py`` would be run.
It is taken off again: only ``--arch package.module:factory`` looks there, after every installed package.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if sys.path and not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]

from normfuse.cli import main

if __name__ == "__main__":
    main()
