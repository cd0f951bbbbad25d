"""Train an image encoder without labels: by SimCLR with `fastcl.nt_xent`, or with another loss or method.

    python examples/simclr_imagenet.py digits
    python examples/simclr_imagenet.py digits --loss swd-hypersphere
    python examples/simclr_imagenet.py path/to/images --method moco-v2 --arch resnet18
    python examples/simclr_imagenet.py /data/imagenet --batch 1024 --precision bf16 --checkpoint-every 500 --resume
    torchrun --nproc-per-node 8 examples/simclr_imagenet.py /data/imagenet --batch 4096 --precision bf16

The parts are in the folder `simclr` beside this file; `--help` lists the settings, docs/trainer.md explains them.
"""

import sys

from simclr.cli import main

if __name__ == "__main__":
    sys.exit(main())
