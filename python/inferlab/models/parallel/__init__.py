"""One model over several processes, each with a device of its own: tensor parallelism.

Rank 0 leads. It alone schedules, drafts, decides and commits; what it wants of the model it does
together with the others (`ranks.Ranks.everywhere`), who hold the rest of the weights and of the K/V
cache (`part`) and decide nothing. So ranks cannot part, whatever they compute and however long it
takes them, and the engine, its drafters and its controllers are those of one device: to them a
`model.ShardedModel` is a target like any other.

A row's bits must not depend on its company, or a token could depend on what is verified beside it;
so what ranks computed is added up in one order everywhere (`sums`). Which layers are shared out,
and how, is transformers' to say (`plans`).
"""
