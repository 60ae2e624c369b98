"""The demo: trains a small class-conditional U-Net on real images with fastdiff, and draws new ones."""


class DemoError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""
