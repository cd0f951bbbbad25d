"""Train an image encoder with SimCLR: with `fastcl.nt_xent` or another of the library's losses.

    python examples/simclr_imagenet.py /data/imagenet --arch resnet50 --optimizer lars --batch 1024 --bf16
    python examples/simclr_imagenet.py digits
    python examples/simclr_imagenet.py digits --loss swd-hypersphere
    torchrun --nproc-per-node 8 examples/simclr_imagenet.py /data/imagenet --batch 4096 --optimizer lars --bf16

The parts are in the folder `simclr` beside this file; `--help` lists the settings.
"""

import sys

from simclr.cli import main

if __name__ == "__main__":
    sys.exit(main())
