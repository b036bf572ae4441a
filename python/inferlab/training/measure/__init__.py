"""What is accepted of a draft, and how a run went."""
