"""Load on OpenAI-compatible servers: who asks what and when, and what came of it."""
