"""Pretraining: masked language models of the user's own text."""
