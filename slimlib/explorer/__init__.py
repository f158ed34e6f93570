"""The bitrate explorer: slide the rate, see what the machine still sees.

`slim explore` is a web page of its own, and notebook 08 shows the same page and how it works: plain Python in `engine`,
the widgets in `page` (drawn by viewer.js and live.js), the web page's server in `serve`. `slim explore --static` writes
a page that needs no kernel (`static`, static.js).
"""

import os

# Threads that wait for work shall sleep: while they spin, other programs slow the page down many times over. OpenMP
# reads this when PyTorch is imported: it counts where the explorer is imported first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
