"""The bitrate explorer: slide the rate, see what the machine still sees.

`slim explore` is a web page of its own, notebook 08 shows the same page and how it works. Plain Python in `engine`, the
widgets around it in `page` (how they look: page.css, what they say: page.html), the web page's server in `serve`.
"""
