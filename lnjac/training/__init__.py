"""One run: training, measuring, checkpoints, re-opening."""
