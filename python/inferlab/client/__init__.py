"""HTTP: asking OpenAI-compatible servers, and reading what they answer."""
