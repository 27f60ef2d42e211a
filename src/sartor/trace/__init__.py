"""Attribution of a reply to training rows: retrieval, gradients, unrolling, and proof by retraining."""
