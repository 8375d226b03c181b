"""The pictures of the study, one family per file; each takes computed data and returns a Figure."""
