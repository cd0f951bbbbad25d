"""What two papers found, as experiments that run on a desk in minutes, and at the published size where there is one.

    python examples/experiments/rand_bit.py                                          # one of them
    python examples/experiments/rand_bit.py --scale paper --data mnist=path/to/mnist  # as published
    python examples/experiments/all.py                                               # all of them, and their page

Each file is one experiment: its runs, what is measured in one, a table and a figure. `study` runs them and keeps what
is finished, `training` is the way to the trainer, `datasets` holds the constructed pictures, `figures` draws.

P1 is "Intriguing Properties of Contrastive Losses" (Chen, Luo & Li 2021), P2 "Towards Good Practices in Self-supervised
Representation Learning" (2020).
"""
