"""The parts of the SimCLR trainer `examples/simclr_imagenet.py`.

`data` opens pictures and deals them out in batches, `augment` makes the two views, `model` holds encoders
and projection heads, `losses` what is minimised, `optim` the optimisers and the schedule, `train` the loop,
`probe` measures frozen features, `plots` and `report` show what came out. `cli` turns a command line into a run.
"""
