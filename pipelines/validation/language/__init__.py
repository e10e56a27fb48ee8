"""Validation on small language models: responses, the scale of scores, retraining, removal, and known facts."""
