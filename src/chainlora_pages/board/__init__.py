"""`chainlora board`: a local page to train runs, watch them, ask their states, undo and export.

models.py     the models to offer for a new run
previews.py   the first rows of an uploaded file, and its columns
training.py   runs the command that trains on an uploaded file, in a separate process
watching.py   the progress of runs, read from their files
desk.py       the states of one run, to be asked
right_table.py a table of questions: the expected answers, and those of two states
train_tab.py  the tab Train, in Gradio
ask_tab.py    the tab Ask
correcting.py the section to replace or take out a data set
widgets.py    what the tabs share
app.py        the page, its server and its guard, in Gradio
"""
