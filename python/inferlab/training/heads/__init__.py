"""Students of a target: draft models, Medusa heads, EAGLE heads, and how they are taught."""
