"""The parts of the trainer `examples/simclr_imagenet.py`.

`settings` reads the command line and `cli` turns it into a run: `data` opens pictures, `augment` makes views of them,
`batches` deals them out, `model` holds encoders and heads, `methods` and `losses` what is learnt from, `optim` the
optimisers and the schedule, `train` the loop, `checkpoint` where it can be taken up again, `probe` measures frozen
features, `log` and `report` show what came out.
"""
