"""Faces towards servers: the Hugging Face baseline and the OpenAI-compatible client."""
