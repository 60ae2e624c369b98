"""What a call costs the host, counted."""

import sys


def python_calls(call, folder=""):
    """How many functions of Python a call enters, of those whose files are in ``folder``."""
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event == "call" and frame.f_code.co_filename.startswith(folder)

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered
