"""Trains targets and drafts; makes the bundled pair `inferlab/tiny` and `inferlab/tiny-draft`.

`train` is the command, `pretrain` and `distill` say what is learned, `loop` how a run proceeds,
`corpus` what is read and which files are held out. A new kind of draft (heads on the target, say)
is one more module beside `distill` that hands its loss to `loop.train_loop`, and one more
subcommand in `train`.
"""
