"""python -m testbed.judge FILE...: judge a guest's RAM image, by its parts, where it lies; the answer is JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cattrs

from testbed.proofs import read_image

if __name__ == "__main__":
    print(json.dumps(cattrs.unstructure(read_image(tuple(map(Path, sys.argv[1:]))))))
