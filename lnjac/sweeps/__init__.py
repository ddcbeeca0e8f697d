"""Many runs: what a script offers to be swept, the sweeper, and the launchers that run its jobs."""
