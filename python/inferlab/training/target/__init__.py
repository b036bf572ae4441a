"""A target from scratch: shape, tokenizer, optimizer, loop and finished folder."""
