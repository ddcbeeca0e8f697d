"""Engines that run a sweep's jobs: processes on this machine, Slurm, Ray.

Hydra imports these modules at every start, so their own imports stay light.
"""
