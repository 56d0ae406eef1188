"""How Sphinx renders the site; `build.py` lays out its pages."""

from chainlora import __version__

project = "chainlora"
author = "The chainlora contributors"
copyright = f"2026 {author}, Apache-2.0. Version {__version__}"  # the footer
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
myst_enable_extensions = ["deflist"]
smartquotes = False  # they make a dash of the two of an option
myst_heading_anchors = 4  # links to headings are written as GitHub has them
default_role = "code"
highlight_language = "text"  # of blocks that name none, such as output
add_module_names = False  # public names are those of `chainlora` itself
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "chainlora"
html_static_path = [".static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
