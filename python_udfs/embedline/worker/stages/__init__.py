"""The stages of a batch: prepare, embed, write, and what becomes of failures."""
