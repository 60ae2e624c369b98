"""The demo: trains a small class-conditional U-Net on real images with fastdiff, and draws new ones.

Every random choice is a function of (seed, step), so a checkpoint is the whole state: a run that was killed and resumed
gives the same bits as one that was not. Files are written under a temporary name, synced and renamed.
"""


class DemoError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""
