"""`accelerate launch train.py --config configs/...yaml` is `genvision train` on every process."""

import sys

from genvision.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
