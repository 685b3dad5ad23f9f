"""`rome agent`: the agent in a terminal and headless.

`main.py` parses options, `models.py` opens the model, `place.py` the sandbox, `conversation.py`
puts the loop together and drives it; `headless.py` and `terminal.py` are the two faces. `undo.py`
keeps the directory's files before each instruction, `safe.py` makes text harmless for a terminal.
"""
