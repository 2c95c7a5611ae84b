"""Second-order pruning of a whole model on its loss: oBERT (arXiv 2203.07259) and M-FAC (arXiv 2107.03356)."""
