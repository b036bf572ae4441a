"""Trains targets, drafts and draft heads; makes the bundled models.

`train` and `train_student` are the commands. A target: `tokenizer`, `pretrain`, `loop`. A student
of a target, be it a draft model, Medusa heads or an EAGLE head: `sources` (what is read, and what
is held out), `material` (what the target writes), `features` (what it thinks, on disk), `students`
and `losses` (who learns what), `trainer` and `teach` (how a run proceeds), `heldout` and
`dynamic_tree` (what is accepted), `report` and `curve`.
"""
