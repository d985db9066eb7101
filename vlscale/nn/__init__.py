"""Layers shared by the families and the objectives. Imports torch and nothing of ours."""
