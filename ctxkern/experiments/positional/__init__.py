"""Positional and semantic learning: a teacher and a student of one attention layer, many experiments at a time.

After Cui, Behrens, Krzakala and Zdeborová, "A phase transition between positional and semantic learning in a solvable
model of dot-product attention" (arXiv 2402.03902).
"""
