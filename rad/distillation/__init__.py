"""Distillation: losses, data order, the training loop with exact resume, and stage-1 alignment."""
