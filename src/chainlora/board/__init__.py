"""`chainlora board`: a local page to watch runs, and to mix stages and links while one talks.

watching.py   what runs look like to somebody who reads their files alone
desk.py       the links of one run, at strengths of one's own, heard and scored
app.py        the page, by Gradio, and the only file that imports it
"""
