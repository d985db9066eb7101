"""Checkpoints: what they hold, where they lie, who writes them and when, and how they are found again."""
