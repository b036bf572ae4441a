"""What students learn from: texts, what the target writes, and its hidden states."""
