"""Language models: token batches, what a teacher says of them, divergences that never hold [N, V], generation, other tokenizers, pruning, and what methods share.

Notation: B rows of L tokens, N valid positions of a batch, V vocabulary, k kept entries, d width; targets are shifted once, at collation.
"""
