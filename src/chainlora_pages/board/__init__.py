"""`chainlora board`: a local page to train runs, watch them, ask their states, undo and export.

training.py   runs the command that trains on an uploaded file, in a separate process
watching.py   the progress of runs, read from their files
desk.py       the states of one run, to be asked and scored
tabs.py       the tabs Train and Ask, in Gradio
app.py        the page, its server and its guard, in Gradio
"""
