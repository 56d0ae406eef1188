"""`chainlora board`: a local page to train runs, watch them, ask their states, undo and export.

training.py   the command that trains on an uploaded file, in a process of its own
watching.py   what runs look like to somebody who reads their files alone
desk.py       the states of one run, at strengths of one's own, asked and scored
tabs.py       what the tabs Train and Ask hold, by Gradio
app.py        the page, its server and its guard, by Gradio
"""
