"""One run: training, measuring, checkpoints, trackers, re-opening."""
