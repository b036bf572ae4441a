"""Trains targets, drafts and draft heads; makes the bundled models.

The rooms, each using only those before it:

* `material`: what is read and what is held out, what the target writes, its hidden states on disk.
* `target`: a target from scratch: its shape, tokenizer, optimizer, loop, folder.
* `measure`: what is accepted, and how a run went.
* `heads`: the students of a target, draft models, Medusa heads and EAGLE heads: what each is taught
  and how a run proceeds.
"""
