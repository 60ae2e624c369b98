"""The documents as a site: ``make docs``, which copies them as they lie here, so that their links hold."""

import fastdiff

project, author, copyright = "fastdiff", "fastdiff", "2026, Apache-2.0"
version = release = fastdiff.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
exclude_patterns = ["**.py"]
html_theme = "furo"
html_title = f"fastdiff {release}"
html_copy_source = False
html_static_path = html_css_files = ["site.css"]
pygments_dark_style = "github-dark"
myst_heading_anchors = 3
suppress_warnings = ["toc.not_included"]  # benchmarks/results, which the documents link
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
