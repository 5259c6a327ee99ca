"""Distillation: a student learns to give the distributions, and the states, of its teacher."""
